"""The version of the numerics: part of every trial's identity.

Bump it by hand, in the commit that changes what a trial computes from the same config, seed and data.
The golden losses in `tests/core/golden/` fail when the numbers move without a bump.
"""

VERSION = 2
