"""The one door to torchvision.

torchvision's usual wheel is built against CUDA. Beside a CPU-only torch its extension does not load, and the import
ends with "operator torchvision::nms does not exist", since its Python code refers to operators that only the extension
declares. Declaring two schemas is enough for everything but `torchvision.io` and `torchvision.ops`, neither of which is
used here. Beside a torch that it was built for, the first import succeeds and nothing is declared.
"""

import torch

try:
    import torchvision
except RuntimeError as error:
    if "operator torchvision::" not in str(error):
        raise
    _library = torch.library.Library("torchvision", "FRAGMENT")  # kept: the schemas live as long as it does
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
