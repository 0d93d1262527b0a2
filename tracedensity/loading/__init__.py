"""Models to explain: the bundled ones, a folder on disk, any TransformerLens name, or the user's own object."""

from tracedensity.loading.bundled import ASSETS as ASSETS
from tracedensity.loading.bundled import bundled_models as bundled_models
from tracedensity.loading.entry import load_model as load_model
