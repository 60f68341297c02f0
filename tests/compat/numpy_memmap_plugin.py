"""A pytest plugin: has `numpy.memmap` and what makes one be quire's, before tests import them."""

import numpy as np
import numpy.lib.format

import quire.compat.memmap as ours

np.memmap = ours.memmap
np.load = ours.load
numpy.lib.format.open_memmap = ours.open_memmap
