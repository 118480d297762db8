"""Self-supervised backbones for timm, made better by SSL++ (Chen et al., IEEE TIP 2022).

Importing this package registers them: ``timm.list_models("sslpp_*")``,
``timm.create_model("sslpp_resnet10t_s32", pretrained=True)``.
"""

from . import sslpp as sslpp

__version__ = "0.1.0"
