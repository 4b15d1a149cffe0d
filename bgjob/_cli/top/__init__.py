"""The screen of `bgjob top`, with nothing but the standard library.

    seen       what the database has told, and what the user has chosen
    history    what the overviews of this run said one after the other: which queues fall behind
    text       styled texts that fit into a number of columns
    columns    the columns of the queues
    frame      one frame, as lines of styled text: a pure function of all these
    keys       what a key does to what the user has chosen
    terminal   the terminal: another screen, keys without Enter, changes of the size
    source     the database: a connection that never waits for long
    live       the loop: a thread asks the database, the main thread draws and reads keys

Whatever happens, the terminal is left as it was: at the end of the block, at an exception, and
for each signal that ends or stops a process and can be handled.
"""
