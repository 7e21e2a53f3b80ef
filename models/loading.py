"""The one way to open a checkpoint for use: sizes from the file itself, preprocessing included.

    from models import load
    blip = load("output/mine/checkpoint_best.pth")      # a run folder, a Hugging Face folder or a released name as well
    blip.similarity(images, texts)                      # (N, M) cosines of PIL pictures or paths, and sentences
    blip.match(images, texts)                           # (N, M) probabilities that they belong together

Shapes: N images, M texts, b images of a pass, n image tokens, V image width, E embedding width, S pixels a side,
L text tokens, P pairs.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from checkpoints.load import fit, open_weights, require_equal_heads
from checkpoints.weights import QUEUES, TWINS, Sizes, WeightFile, online_name, read_sizes
from configs.schema import AUTO, PRECISIONS, load_config
from configs.sizes import VIT_SIZES, MedConfig, load_med_config
from models.arrangements import TrainingTexts
from models.blip_retrieval import BLIP_Retrieval
from models.gradcam import Heatmap, word_heatmap
from transform.image import MEAN, STD, eval_transform
from transform.rgb import AS_BLIP, PixelRule, to_rgb
from transform.text import CaptionTokenizer, TokenizedText
from utils import find_path, precision

log = logging.getLogger(__name__)

HEAD_WIDTH = 64  # of BERT and of every published BLIP text encoder
TEXTS_PER_PASS = 256  # of one image
Picture = Image.Image | str | os.PathLike  # what `Blip` takes for an image


def load(
    source: str | os.PathLike,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    config: str = "",
    cache_dir: str = "",
) -> "Blip":
    """Open a checkpoint to use it: a `.pth` of any known layout, a run or Hugging Face folder, a released file's name.

    The model has the sizes that the file states. A file without them, such as a released one, has published sizes,
    known by its shapes; where these do not tell everything, ValueError asks for `config`, a YAML with `vit` and
    `med_config`.
    `precision`: fp32, tf32 or bf16, as in the YAML.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    device = usable_device(device)
    file = open_weights(os.fspath(source), cache_dir)
    model = empty_model(*file_sizes(file, config), file.tokenizer)
    state, report = fit(file, model.state_dict(), model.vit)
    log.info("%s: %s", file.name, report)
    own = {key: value for key, value in state.items() if not key.startswith(TWINS)}
    weights = {key: value.to(device, torch.float32, copy=True) for key, value in own.items()}
    for key, value in model.state_dict().items():
        if key.startswith(TWINS):
            weights[key] = weights[online_name(key)]  # not used here: share the memory
        elif key in QUEUES:
            weights[key] = torch.zeros_like(value, device=device)
    model.load_state_dict(weights, assign=True)
    trained = file.extra.get("config", {})
    rule = PixelRule(**{key: trained[key] for key in PixelRule._fields if key in trained})
    colours = trained.get("image_mean") or MEAN, trained.get("image_std") or STD
    return Blip(model.eval().requires_grad_(False), precision, rule=rule, colours=colours)


class Blip:
    """A model in eval mode and what turns pictures and sentences into its inputs.

    Pictures (paths or PIL) become RGB, by the `rule` of the run that trained the weights, and a square as in
    evaluation; sentences are cleaned, cut and tokenised as in training. One of them counts as a list of one. Results
    are float32 tensors on the CPU. It is for use, not for training: the weights take no gradient, and momentum twins
    share the memory of the online weights.
    """

    def __init__(
        self,
        model: BLIP_Retrieval,
        precision: str = "fp32",
        batch_size: int = 32,
        rule: PixelRule = AS_BLIP,
        colours: tuple[Sequence[float], Sequence[float]] = (MEAN, STD),
    ):
        """`colours`: mean and standard deviation that pixels are normalised by."""
        self.model, self.precision, self.batch_size, self.rule = model, precision, batch_size, rule
        self.colours = colours
        self.transform = eval_transform(model.image_size, *colours)

    def pixels(self, images: Picture | Sequence[Picture]) -> Tensor:
        """(N, 3, S, S), normalised."""
        size = self.model.image_size
        pixels = [self.transform(_open_rgb(image, self.rule)) for image in _as_list(images)]
        return torch.stack(pixels) if pixels else torch.empty(0, 3, size, size)

    def tokens(self, texts: str | Sequence[str]) -> TokenizedText:
        """Token ids and mask (M, L)."""
        tokenizer = self.model.tokenizer
        return tokenizer.tokenize([tokenizer.clean(text) for text in _as_list(texts)])

    def image_features(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Unit-length embeddings (N, E)."""
        return self._cat(feat for _, feat in self._encode_images(_as_list(images)))

    def text_features(self, texts: str | Sequence[str]) -> Tensor:
        """Unit-length embeddings (M, E)."""
        return self._cat(self._encode_texts(_as_list(texts)))

    def similarity(self, images: Picture | Sequence[Picture], texts: str | Sequence[str]) -> Tensor:
        """Cosines of the contrast (N, M)."""
        return self.image_features(images) @ self.text_features(texts).T

    def match(self, images: Picture | Sequence[Picture], texts: str | Sequence[str], pairwise: bool = False) -> Tensor:
        """P(match) by the matching head: (N, M), or (N,) of image i with text i when `pairwise`."""
        return self._logits(images, texts, pairwise)[0].softmax(-1)[..., 1]

    def score(self, images: Picture | Sequence[Picture], texts: str | Sequence[str], pairwise: bool = False) -> Tensor:
        """What evaluation ranks by, matching logit + cosine: (N, M), or (N,) when `pairwise`."""
        logits, cosine = self._logits(images, texts, pairwise)
        return logits[..., 1] + cosine

    def picture(self, image: Picture) -> Image.Image:
        """The RGB picture, before it becomes a square."""
        return _open_rgb(image, self.rule)

    def heatmap(self, image: Picture, text: str, layer: int | None = None) -> Heatmap:
        """Where matching looks for each word of the text (`models/gradcam.py`); `layer` 0-based, default 7 of 12."""
        with torch.no_grad(), precision(self.model, "fp32"):
            pixels = self.pixels(image).to(self._device)
            return word_heatmap(self.model, self.model.encode_image(pixels), self.model.tokenizer.clean(text), layer)

    def encode(self, images: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        """Image tokens (N, n, V), on the model's device, and unit-length embeddings (N, E), of a few pictures."""
        parts = list(self._encode_images(_as_list(images)))
        return torch.cat([tokens for tokens, _ in parts]), self._cat(feat for _, feat in parts)

    def match_tokens(self, tokens: Tensor, text: str) -> Tensor:
        """Matching logits (N, 2) of one text with encoded images (N, n, V)."""
        one = self.tokens(text)
        many = TokenizedText(*(x.expand(len(tokens), -1).contiguous() for x in one))
        with self._inference():
            return self._match(tokens.to(self._device), many, range(len(tokens)))

    # ---- passes ---------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self.model.temp.device

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with torch.inference_mode(), precision(self.model, self.precision):
            yield

    def _cat(self, parts: Iterable[Tensor]) -> Tensor:
        """Features in batches (b, E) -> (N, E), N may be 0.

        Joined outside of inference mode, so that the caller may train something on them.
        """
        return torch.cat([torch.empty(0, self.model.text_proj.out_features), *parts])

    def _encode_images(self, images: list[Picture]) -> Iterator[tuple[Tensor, Tensor]]:
        """Image tokens (b, n, V) and embeddings (b, E), batch after batch."""
        for part in _batches(images, self.batch_size):
            with self._inference():
                tokens = self.model.encode_image(self.pixels(part).to(self._device))
                feat = self.model.image_feature(tokens).cpu()
            yield tokens, feat

    def _encode_texts(self, texts: list[str]) -> Iterator[Tensor]:
        """Embeddings (b, E), batch after batch."""
        for part in _batches(texts, self.batch_size):
            with self._inference():
                feat = self.model.text_feature(self.model.encode_text(self.tokens(part).to(self._device))).cpu()
            yield feat

    def _logits(
        self, images: Picture | Sequence[Picture], texts: str | Sequence[str], pairwise: bool
    ) -> tuple[Tensor, Tensor]:
        """Matching logits (N, M, 2) and cosines (N, M), or (N, 2) and (N,) of pairs."""
        images, texts = _as_list(images), _as_list(texts)
        if pairwise and len(images) != len(texts):
            raise ValueError(f"pairwise takes as many images as texts, got {len(images)} and {len(texts)}")
        text_feat, image_feat, logits = self.text_features(texts), [], []
        passes = [self.tokens(part) for part in _batches(texts, self.batch_size if pairwise else TEXTS_PER_PASS)]
        for i, (tokens, feat) in enumerate(self._encode_images(images)):
            image_feat.append(feat)
            with self._inference():
                if pairwise:
                    logits.append(self._match(tokens, passes[i], range(len(tokens))))
                else:
                    logits += [self._match_all(image, passes) for image in tokens.split(1)]
        feat = self._cat(image_feat)
        cosine = (feat * text_feat).sum(1) if pairwise else feat @ text_feat.T
        return torch.cat([torch.empty(0, *cosine.shape[1:], 2), *logits]), cosine

    def _match_all(self, tokens: Tensor, passes: list[TokenizedText]) -> Tensor:
        """Logits (1, M, 2) of one image (1, n, V) with all texts."""
        parts = [self._match(tokens, text, [0] * len(text.input_ids)) for text in passes]
        return torch.cat([torch.empty(0, 2), *parts])[None]

    def _match(self, tokens: Tensor, text: TokenizedText, image_of_text: Sequence[int]) -> Tensor:
        """Logits (P, 2) of texts with the images (b, n, V) they look at."""
        lengths = text.attention_mask.sum(1).tolist()
        arrangement = TrainingTexts(lengths, self._device, image_of_text, len(tokens))
        return self.model.match(text.to(self._device), tokens, arrangement).cpu()


def _as_list(items: Any) -> list:
    return [items] if isinstance(items, str | os.PathLike | Image.Image) else list(items)


def _batches(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _open_rgb(picture: Picture, rule: PixelRule) -> Image.Image:
    if isinstance(picture, Image.Image):
        return to_rgb(picture, rule)
    if not isinstance(picture, str | os.PathLike):
        raise ValueError(
            f"a picture is a path or a PIL image, got {type(picture).__name__}; PIL's Image.fromarray makes one of an "
            "array"
        )
    try:
        with Image.open(picture) as image:
            return to_rgb(image, rule)
    except Exception as error:  # a broken file can raise nearly anything in Pillow's decoders
        raise ValueError(f"image {os.fspath(picture)} cannot be read ({error or type(error).__name__})") from None


def usable_device(name: str | torch.device) -> torch.device:
    """The device, or ValueError where there is none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown: use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device {name}: this PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


# ---- sizes ----------------------------------------------------------------------------------------------------------


def file_sizes(file: WeightFile, config: str = "") -> tuple[Sizes, MedConfig]:
    """The sizes of a model that the file fits, its own or those of the YAML `config`."""
    sizes = read_sizes(file.state, file.name, file.extra.get("config", {}).get("vit", ""))
    if not sizes.vit:
        raise ValueError(
            f"{file.name}: {sizes.vit_words} has an unknown number of heads; known are {', '.join(VIT_SIZES)}."
        )
    if not config:
        return sizes, text_config(file, sizes)
    cfg = load_config(config)
    med = text_config(file, sizes) if cfg.med_config == AUTO else load_med_config(find_path(cfg.med_config))
    require_equal_heads(file, med)
    name = sizes.vit if cfg.vit == AUTO else cfg.vit
    size = VIT_SIZES[name]
    vit = size.norm_pre, name
    return Sizes(size.width, size.depth, cfg.patch_size, cfg.image_size, cfg.embed_dim, sizes.text, *vit), med


def empty_model(sizes: Sizes, med: MedConfig, tokenizer: CaptionTokenizer | None = None) -> BLIP_Retrieval:
    """A model of names and shapes, without memory; the numbers of image heads come from VIT_SIZES."""
    with torch.device("meta"):
        return BLIP_Retrieval(
            med,
            image_size=sizes.image_size,
            vit=sizes.vit,
            embed_dim=sizes.embed_dim,
            patch_size=sizes.patch_size,
            queue_size=1,
            tokenizer=tokenizer,
        )


def text_config(file: WeightFile, sizes: Sizes) -> MedConfig:
    """The text encoder's config: the file's own, or what its shapes tell and HEAD_WIDTH."""
    if "text_config" in file.extra:
        return MedConfig(**file.extra["text_config"])
    hidden = sizes.text["hidden_size"]
    if hidden % HEAD_WIDTH:
        raise ValueError(
            f"{file.name}: does not say how many attention heads its text encoder ({hidden} wide) has: give --config "
            "(in Python, config=), a YAML whose med_config does."
        )
    log.info("%s: does not say how many text attention heads it has; taking %d wide ones", file.name, HEAD_WIDTH)
    return MedConfig(num_attention_heads=hidden // HEAD_WIDTH, **sizes.text)
