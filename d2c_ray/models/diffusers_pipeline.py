"""Sampling an exported DiT or SiT with diffusers alone; `export` copies this file as it is.

pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
images = pipe(["cat", 3], num_inference_steps=50, guidance_scale=1.5).images
"""

import inspect
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class D2CPipeline(DiffusionPipeline):
    """Images of classes, by name or number.

    Components: transformer (D2CTransformer2DModel), scheduler (DDPMScheduler of a DiT, FlowMatchEulerDiscreteScheduler of
    a SiT on the linear path, none on the cosine path, where Euler's steps are taken here), vae (AutoencoderKL, of a model
    of latents).
    """

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]
    _optional_components = ["scheduler", "vae"]  # noqa: RUF012
    transformer: Any
    scheduler: Any
    vae: Any

    def __init__(self, transformer, scheduler=None, vae=None):  # diffusers would check annotated ones
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = transformer.config.class_names or []
        self.labels: dict[str, int] = {}  # by whole name, and by each of its synonyms that only one class has
        words = [word.strip() for name in names for word in name.split(",")]
        for number, name in enumerate(names):
            for word in name.split(","):
                if word.strip() and words.count(word.strip()) == 1:
                    self.labels[word.strip()] = number
        for number, name in enumerate(names):
            if name and names.count(name) == 1:
                self.labels[name] = number

    def class_ids(self, classes: list[str | int]) -> list[int]:
        """The numbers of classes given by name or number."""
        count = self.transformer.config.spec["num_classes"]
        found = []
        for given in classes:
            number = self.labels.get(given, -1) if isinstance(given, str) else int(given)
            if not 0 <= number < count:
                raise ValueError(
                    f"{given!r} is no class: a number from 0 to {count - 1}, or one of {', '.join(list(self.labels)[:20]) or '(it has no names)'}"
                )
            found.append(number)
        return found

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[str | int] | str | int,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """
        Args:
            class_labels: one image each; names or numbers.
            guidance_scale: of classifier-free guidance; 1: none.
            latents: noise to start from, N x C x H x W; drawn with `generator` otherwise.
            output_type: pil, np (N x H x W x C in [0, 1]), pt (N x C x H x W in [0, 1]) or latent.
        """
        spec, device = self.transformer.config.spec, self._execution_device
        if self.vae is None and output_type != "latent" and self.transformer.config.latent_kind == "vae":
            raise ValueError(
                "this model works on the latents of a VAE, which was not exported with it: pass vae=AutoencoderKL.from_pretrained(...)"
            )
        numbers = self.class_ids(class_labels if isinstance(class_labels, list | tuple) else [class_labels])
        label = torch.tensor(numbers, device=device)
        shape = (len(numbers), spec["channels"], spec["input_size"], spec["input_size"])
        x = (
            latents.to(device, torch.float32)
            if latents is not None
            else randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        )
        x = (
            self._denoise_dit(x, label, num_inference_steps, guidance_scale, generator)
            if spec["kind"] == "dit"
            else self._denoise_sit(x, label, num_inference_steps, guidance_scale)
        )
        images: Any = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def predict(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor, guidance: float) -> torch.Tensor:
        """Classifier-free guidance, u + g (c - u) on the image's channels; a learned variance stays the conditional one."""
        spec = self.transformer.config.spec
        if guidance == 1.0:
            return self.transformer(x, t, label)
        both = torch.cat([label, torch.full_like(label, spec["num_classes"])])
        conditional, unconditional = self.transformer(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        own = spec["channels"]
        mixed = unconditional[:, :own] + guidance * (conditional[:, :own] - unconditional[:, :own])
        return torch.cat([mixed, conditional[:, own:]], dim=1)

    def _denoise_dit(self, x: torch.Tensor, label: torch.Tensor, steps: int, guidance: float, generator: Any) -> torch.Tensor:
        self.scheduler.set_timesteps(steps, device=x.device)
        # Schedulers other than DDPMScheduler know no learned variance.
        learned = getattr(self.scheduler.config, "variance_type", "") in ("learned", "learned_range")
        extra = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            out = self.predict(self.scheduler.scale_model_input(x, t), t.expand(len(x)), label, guidance)
            x = self.scheduler.step(out if learned else out[:, : x.shape[1]], t, x, **extra).prev_sample
        return x

    def _denoise_sit(self, x: torch.Tensor, label: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
        times = np.linspace(1.0, 0.0, steps + 1)
        if self.scheduler is None:  # Euler on the ODE, whatever the path
            for now, then in self.progress_bar(list(pairwise(times))):
                t = torch.full((len(x),), float(now), device=x.device)
                x = x + float(then - now) * self.predict(x, t, label, guidance)
            return x
        self.scheduler.set_timesteps(sigmas=times[:-1].tolist(), device=x.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            out = self.predict(x, (t / self.scheduler.config.num_train_timesteps).expand(len(x)), label, guidance)
            x = self.scheduler.step(out, t, x).prev_sample
        return x

    def _decode(self, x: torch.Tensor, output_type: str) -> Any:
        if self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            x = self.vae.decode((x / self.vae.config.scaling_factor + shift).to(self.vae.dtype)).sample
        x = (x.float().clamp(-1, 1) + 1) / 2
        if output_type == "pt":
            return x
        images = x.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images
