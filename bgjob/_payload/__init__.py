"""How a payload is read into the type that a handler's annotation names.

JSON has seven kinds of values, Python's annotations name more. `models` makes the codec of a
class: pydantic models and msgspec Structs read and write themselves, dataclasses are read
here. `dataclass` reads the annotations of one, once, into the shape of its values;
`containers` makes shapes of shapes: choices, unions, lists, mappings; `scalars` are the
shapes without parts, and the error that gathers the path to what does not fit.
"""
