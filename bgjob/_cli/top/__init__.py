"""The screen of `bgjob top`, with nothing but the standard library.

    history    what the overviews of this run said one after the other: which queues fall behind
    frame      one frame, as lines of styled text, from an overview and a size: a pure function
    terminal   the terminal: another screen, keys without Enter, changes of the size
    source     the database: a connection that never waits for long
    live       the loop: a thread asks for overviews, the main thread draws and reads keys

Whatever happens, the terminal is left as it was: at the end of the block, at an exception, and
for each signal that ends or stops a process and can be handled.
"""
