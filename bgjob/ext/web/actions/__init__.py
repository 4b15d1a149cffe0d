"""What buttons do. Each is a function that `action` has wrapped, which checks the permission.

A button that a user may not press is not drawn, but that is for the user's sake only.
"""
