"""Writes golden/*.pth with torch.save, so that reading PyTorch's files is tested where PyTorch is absent.

  python -m tests.conversion.make_golden

The values count up from zero in each dtype, so that the tests know them without a second file.
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def counting(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """0, 1, 2, ... in C order; of booleans every other is true."""
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    return (numbers % 2 if np.dtype(dtype) == np.bool_ else numbers).astype(dtype)


def views(counting: np.ndarray) -> dict[str, np.ndarray]:
    """What golden/views.pth holds, when `counting` has the shape (4, 6); all but the last share one storage."""
    return {
        "whole": counting,
        "transposed": counting.T,
        "rows": counting[1:3],
        "columns": counting[:, 2:4],
        "every_other": counting[::2, 1::2],
        "repeated": np.broadcast_to(counting[0], (3, 6)),
        "none": counting[2:2],
        "one": counting[3, 5],
    }


def main() -> None:
    import torch

    def tensor(shape: tuple[int, ...], dtype: str = "float32") -> "torch.Tensor":
        return torch.as_tensor(counting(shape, np.int64) % (2 if dtype == "bool" else 256)).to(getattr(torch, dtype))

    whole = tensor((4, 6))
    cut = views(whole.numpy())
    strided = {name: torch.as_strided(whole, view.shape, [s // 4 for s in view.strides]) for name, view in cut.items()}
    offsets = {"rows": 6, "columns": 2, "every_other": 1, "none": 12, "one": 23}
    for name, offset in offsets.items():
        strided[name] = torch.as_strided(whole, strided[name].shape, strided[name].stride(), offset)
    linear = torch.nn.Linear(3, 2)
    linear.weight.data, linear.bias.data = tensor((2, 3)), tensor((2,))
    model = OrderedDict(weight=tensor((2, 3)))
    GOLDEN.mkdir(exist_ok=True)
    torch.save(
        {dtype: tensor((2, 3), dtype) for dtype in DTYPES} | {"scalar": tensor(()), "step": 3}, GOLDEN / "dtypes.pth"
    )
    torch.save(strided, GOLDEN / "views.pth")
    torch.save(linear.state_dict(), GOLDEN / "state_dict.pth")
    torch.save(dict(linear.named_parameters()), GOLDEN / "parameters.pth")
    torch.save(
        {"model": model, "optimizer": {"lr": 0.1, "state": {0: [tensor((2,))]}}, "step": 7}, GOLDEN / "nested.pth"
    )
    torch.save(model, GOLDEN / "protocol4.pth", pickle_protocol=4)
    torch.save(model, GOLDEN / "legacy.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
