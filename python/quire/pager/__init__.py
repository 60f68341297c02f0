"""The external pager: the process in which stores written in Python run.

A thread can touch a mapped page while it holds the interpreter lock, so no Python may run in its
process to fill that page. The native core therefore starts ``python -m quire.pager`` once per
such store, hands it the pickled recipe of the store, and asks it for bytes::

    core                                                      pager process
      argv ... CONTROL_FD MEMORY_FD RECIPE_FD SLOTS SLOT_BYTES -> unpickle, open the store
      <- b"H" + JSON {size, label, version, kind, details}    or b"E" + JSON {code, errno, message}
      struct "<IIQ" slot, length, offset  (many at once)       -> read_into(the slot's memory)
      <- struct "<Iii" slot, code, errno + UTF-8 message      in any order
      closes CONTROL                                           -> close the store, exit

CONTROL is an ``AF_UNIX`` ``SOCK_SEQPACKET`` socket, one packet a message; MEMORY is a memfd in
which slot ``i`` begins at ``i * SLOT_BYTES``; RECIPE is a memfd with what `encode_recipe` made.

Modules: `recipe` packs a store for the trip, `server` answers requests, `replies` turns an
exception into a reply.
"""

from quire.pager.recipe import Recipe, command, encode_recipe

__all__ = ["Recipe", "command", "encode_recipe"]
