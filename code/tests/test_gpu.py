"""Whole runs on a simulated GPU: nothing mixes devices, and nothing needs what a GPU lacks.

A tensor of the simulated GPU is a label around a tensor of the CPU. torch hands every operation,
also those of the backward pass and of the optimizers, to SimulatedGPU. It checks where the
arguments are, computes on the CPU, and labels the result.
"""

import json

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import a3_gan
import a3_nf
import a3_vae

COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default,
            torch.ops.aten._index_put_impl_.default}  # their indices may be on the CPU


class GPUTensor(torch.Tensor):
    """A tensor that says it is on `device`. `content`, on the CPU, holds its numbers."""

    def __new__(cls, content, device):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, content.shape, strides=content.stride(), dtype=content.dtype, device="meta")
        tensor.content = content
        tensor.label = torch.device(device)
        return tensor

    @property
    def device(self):
        return self.label

    def __deepcopy__(self, memo):
        copied = GPUTensor(self.content.clone(), self.label)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return copied

    def __reduce_ex__(self, protocol):
        return self.content.__reduce_ex__(protocol)  # torch.load(map_location="cpu") gives this

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise AssertionError(f"{operation} outside of the simulation")


class RenamedDevice(TorchFunctionMode):
    """Replaces the device, in calls from Python, by "meta", which torch has on every machine."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(self.renamed, (args, kwargs or {}))
        return function(*args, **kwargs)

    def renamed(self, x):
        is_device = isinstance(x, (str, torch.device)) and str(x) == self.device
        return "meta" if is_device else x


class SimulatedGPU(TorchDispatchMode):
    def __init__(self, device):
        super().__init__()
        self.device = device
        self.n_operations = 0  # on the GPU
        self.n_waits = 0  # of the CPU, for a result of the GPU

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, GPUTensor) for x in tensors)
        if on_gpu and operation not in COPIES:
            checked = tensors[:1] if operation in INDEXING else tensors
            elsewhere = [x for x in checked if not isinstance(x, GPUTensor) and x.dim() > 0]
            assert not elsewhere, f"{operation} is given tensors of the GPU and of the CPU"

        if kwargs.get("device") is not None:
            on_gpu = kwargs["device"].type == "meta"
            kwargs["device"] = "cpu"
        elif operation is torch.ops.aten.copy_.default:
            on_gpu = isinstance(args[0], GPUTensor)
        if on_gpu:
            assert kwargs.get("generator") is None, "a generator of the CPU cannot be used"
        self.n_operations += on_gpu
        is_read = operation is torch.ops.aten._local_scalar_dense.default
        is_copied = operation in COPIES and not on_gpu
        self.n_waits += (is_read or is_copied) and isinstance(tensors[-1], GPUTensor)

        content_args, content_kwargs = tree_map(content, (args, kwargs))
        result = operation(*content_args, **content_kwargs)
        if operation._schema.is_mutable and operation._schema.returns:
            return args[0]  # x.add_(y) is x itself
        if on_gpu:
            return tree_map(self.on_gpu, result)
        return result

    def on_gpu(self, result):
        if not isinstance(result, torch.Tensor):
            return result
        assert self.device != "mps" or result.dtype != torch.float64, "mps has no float64"
        return GPUTensor(result, self.device)


def content(x):
    return x.content if isinstance(x, GPUTensor) else x


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("script, flags", [
    (a3_vae, ["--zdim", "2", "--batch_size", "16"]),
    (a3_gan, ["--latent_dim", "7", "--batch_size", "16"]),
    (a3_nf, ["--n_mixtures", "2", "--batch_size", "8"]),
])
def test_dry_run(script, flags, device, tmp_path, glyphs_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "simulated")
    monkeypatch.setattr(a3_vae, "IW_SAMPLES", 2)
    monkeypatch.setattr(a3_nf, "save_samples", lambda *_: None)  # minutes here; see below
    data = ["--dataset", "glyphs", "--data_dir", str(glyphs_dir), "--out_dir", str(tmp_path)]
    with RenamedDevice(device), SimulatedGPU(device) as gpu:
        args = script.parse_args(["--dry_run", "--epochs", "1", "--device", device, *flags, *data])
        script.main(args)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["device"] == device
    assert gpu.n_operations > 1000


def n_waits_of_training(script, n_batches):
    """How often the CPU waits for the GPU in a pass over this many batches."""
    with RenamedDevice("cuda"), SimulatedGPU("cuda") as gpu:
        pixels = torch.zeros(n_batches, 4, 784, dtype=torch.uint8).to("cuda")
        if script is a3_gan:
            G = a3_gan.Generator(7).to("cuda")
            D = a3_gan.Discriminator().to("cuda")
            optimizers = [torch.optim.Adam(model.parameters(), fused=True) for model in (G, D)]
            batches = [a3_gan.to_images(batch) for batch in pixels]
            gpu.n_waits = 0
            a3_gan.train(batches, D, G, *optimizers)
        else:
            if script is a3_vae:
                model = a3_vae.VAE().to("cuda")
            else:
                model = a3_nf.Model([784], n_mixtures=2).to("cuda")
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            gpu.n_waits = 0
            script.epoch_iter(model, pixels, optimizer)
        return gpu.n_waits


@pytest.mark.parametrize("script", [a3_vae, a3_gan, a3_nf])
def test_an_update_does_not_wait_for_the_gpu(script):
    waits = n_waits_of_training(script, 1)
    assert 1 <= waits <= 2  # for the mean losses
    assert n_waits_of_training(script, 3) == waits


@pytest.mark.parametrize("device", ["cuda", "mps", "mps:0"])
@pytest.mark.parametrize("script", [a3_vae, a3_nf])
def test_channels_last_is_not_used_on_mps(script, device, tmp_path, glyphs_dir, monkeypatch):
    formats = []
    to = torch.nn.Module.to

    def recorded_to(self, *args, **kwargs):
        formats.append(kwargs.get("memory_format"))
        return to(self, *args, **kwargs)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(torch.nn.Module, "to", recorded_to)
    monkeypatch.setattr(torch.optim, "AdamW", stop)
    data = ["--dataset", "glyphs", "--data_dir", str(glyphs_dir), "--out_dir", str(tmp_path)]
    with RenamedDevice(device), SimulatedGPU(device), pytest.raises(KeyboardInterrupt):
        script.main(script.parse_args(["--dry_run", "--device", device, *data]))
    assert (torch.channels_last in formats) == (device == "cuda")


def test_the_simulation_refuses_what_a_gpu_would():
    with RenamedDevice("mps"), SimulatedGPU("mps") as gpu:
        on_gpu = torch.ones(3, device="mps")
        on_cpu = torch.ones(3)
        assert (on_gpu + on_gpu).device.type == "mps"
        assert gpu.n_waits == 0
        assert (on_gpu + on_gpu).sum().item() == 6
        assert on_gpu.cpu().sum() == 3
        assert gpu.n_waits == 2
        with pytest.raises(AssertionError, match="of the GPU and of the CPU"):
            on_gpu + on_cpu
        with pytest.raises(AssertionError, match="generator"):
            torch.randn(3, device="mps", generator=torch.Generator())
        with pytest.raises(AssertionError, match="float64"):
            on_gpu.double()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_sampling_pixel_by_pixel(device):
    with RenamedDevice(device), SimulatedGPU(device):
        levels = a3_nf.GreyLevels().to(device)
        layer = a3_nf.AutoregressiveLayer(torch.arange(3), 4, 5, a3_nf.Mixture(2, levels))
        layer.to(device)
        y = torch.randn(2, 3).to(device)
        ldj = torch.zeros(2, device=device)
        x, ldj = layer(y, ldj, reverse=True)
        y_again, ldj = layer(x, ldj)
        assert y_again.device.type == device
        assert torch.allclose(y.cpu(), y_again.cpu(), atol=1e-3)
