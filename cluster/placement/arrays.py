"""Names for the numpy arrays of this package."""

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.signedinteger]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
