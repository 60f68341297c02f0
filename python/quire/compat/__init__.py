"""Drop-ins for `mmap`, `numpy.memmap` and `multiprocessing.shared_memory`, on quire's mappings.

```python
from quire.compat import mmap  # instead of: import mmap
```

`patch` runs an unchanged program with them in place; so does ``python -m quire.compat script.py``.
Each has its page in `docs/migration`.
"""

from __future__ import annotations

from quire.compat.patch import patch

__all__ = ["patch"]
