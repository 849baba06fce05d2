"""Files: SAEs on their own, those of SAELens, and gene sets that others publish."""

from ._gene_sets import read_gmt, read_go, read_go_terms
from ._sae import read, write
from ._saelens import read_saelens, write_saelens

__all__ = ["read", "read_gmt", "read_go", "read_go_terms", "read_saelens", "write", "write_saelens"]
