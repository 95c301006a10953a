"""Trains an adapter of a UNet, and loads it into a pipeline of diffusers, which paints the same picture."""

import os

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import veneer
from veneer.verbs.convert import convert

torch.manual_seed(0)
sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16}  # tiny, random parts
blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 4}
blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 16}
unet, vae = UNet2DConditionModel(**sizes, **blocks), AutoencoderKL(norm_num_groups=4, block_out_channels=(8,))
scheduler, caption, latents = DDIMScheduler(), torch.randn(1, 4, 16), torch.randn(1, 4, 16, 16)
none = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
pipeline = StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler, **none)
pipeline.set_progress_bar_config(disable=True)


def painted() -> torch.Tensor:
    own = {"prompt_embeds": caption, "latents": latents, "guidance_scale": 1.0, "num_inference_steps": 4}
    return torch.as_tensor(pipeline(**own, output_type="np").images)


plain = painted()
veneer.attach(unet, "lora", to=r".*attn\d\.to_[qkv]", rank=4)
adam = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=0.1)
for _ in range(int(os.environ.get("STEPS", 20))):
    noise, time = torch.randn_like(latents), torch.randint(1000, (1,))
    predicted = unet(scheduler.add_noise(latents, noise, time), time, caption).sample
    (predicted - noise).square().mean().backward()
    adam.step()
    adam.zero_grad()
ours, folder = painted(), veneer.save(unet, os.path.join(os.environ.get("OUT", "runs"), "unet"))
convert(str(folder), to="diffusers", out=f"{folder}-diffusers", part="unet")
veneer.detach(unet)
pipeline.load_lora_weights(f"{folder}-diffusers", weight_name="pytorch_lora_weights.safetensors")
print(f"moved by {(ours - plain).abs().max():.1e}, apart by {(painted() - ours).abs().max():.1e}")
