"""Models: the only room that knows hook names, weight names and architectures."""

from tracedensity.model.adapter import Site as Site
from tracedensity.model.check import ModelReport as ModelReport
from tracedensity.model.entry import adapter_of as adapter_of
from tracedensity.model.entry import as_transformer as as_transformer
from tracedensity.model.entry import check_model as check_model
from tracedensity.model.idle import Attended as Attended
from tracedensity.model.norm import Norm as Norm
from tracedensity.model.norm import NormLayer as NormLayer
from tracedensity.model.offload import is_offloading as is_offloading
from tracedensity.model.offload import offload_activations as offload_activations
from tracedensity.model.precision import full_precision as full_precision
from tracedensity.model.precision import require_finite as require_finite
from tracedensity.model.transformer import Edit as Edit
from tracedensity.model.transformer import Prompt as Prompt
from tracedensity.model.transformer import Transformer as Transformer
from tracedensity.model.wide import widened as widened
