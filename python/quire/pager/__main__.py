"""``python -m quire.pager CONTROL_FD MEMORY_FD RECIPE_FD SLOTS SLOT_BYTES``: see `quire.pager`.

Started by the native core, not by people. Signals meant for the terminal's foreground program do
not end it: the core does, by closing the socket. Standard output belongs to the parent's data, so
whatever a store prints goes to standard error. The process leaves by ``os._exit`` because worker
threads may be inside a store that never returns.
"""

import os
import signal
import sys

if __name__ == "__main__":
    for name in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(name, signal.SIG_IGN)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if len(sys.argv) != 6:
        sys.exit("quire.pager is started by quire itself; there is nothing to run by hand")

    from quire.pager.server import serve

    status = serve(*map(int, sys.argv[1:]))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
