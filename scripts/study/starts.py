"""The weights that all rows of a study start from: the same image encoder, whatever else a network has.

A start file holds what SAM has: image encoder, prompt encoder and mask decoder. AutoMedSAM takes all three; HSP-SAM
takes the encoders and learns a decoder of its own. What a network has beyond that, each row learns anew.
"""

from pathlib import Path

from scripts.study.completion import FileDigests
from scripts.workflow import BUNDLE_ROOT

CLASS_PROMPT_PREFIX = "class_prompt_encoder."


class StartFiles:
    """The start files of a study, written into its folder where they are not files already.

    Args:
        folder: of the study.
        digests: of files.
    """

    def __init__(self, folder: Path, digests: FileDigests) -> None:
        self.folder = folder
        self.digests = digests
        self._known: dict[object, Path] = {}

    def trained(self, pretrained: str) -> Path:
        """Give a file as all rows start from it: without a class prompt encoder, which each row learns anew.

        Args:
            pretrained: path of a published file or of an AutoMedSAM, or a config's expression for one.

        Raises:
            CheckpointError: the file cannot be read.
        """
        source = _resolved(pretrained)
        if source not in self._known:
            self._known[source] = self._without_class_prompts(source)
        return self._known[source]

    def seeded(self, encoder: str, image_size: int | None, seed: int) -> Path:
        """Write random weights, the same for both networks.

        Each network draws its own numbers when it is built, in an order of its own, so that one seed gives the two
        networks image encoders that need not be alike.

        Args:
            encoder: name of the image encoder.
            image_size: in pixels; None for the encoder's published size.
            seed: of the training.
        """
        key = (encoder, image_size, seed)
        if key not in self._known:
            self._known[key] = self._write_seeded(encoder, image_size, seed)
        return self._known[key]

    def _without_class_prompts(self, source: Path) -> Path:
        """Leave the class prompt encoder out; a file without one stays as it is."""
        from scripts.networks.checkpoints import read_state_dict, save_state_dict

        state = read_state_dict(source)
        kept = {name: value for name, value in state.items() if not name.startswith(CLASS_PROMPT_PREFIX)}
        if len(kept) == len(state):
            return source
        path = self.folder / f"start_{self.digests.of(source)[:12]}.pt"
        save_state_dict(kept, path)
        return path

    def _write_seeded(self, encoder: str, image_size: int | None, seed: int) -> Path:
        """Build the three parts with a seed, and leave the random numbers of everything else as they were."""
        import torch

        from scripts.networks.checkpoints import save_state_dict
        from scripts.networks.image_encoders import build_image_encoder
        from scripts.networks.mask_decoding import build_mask_decoder, build_prompt_encoder

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            image_encoder = build_image_encoder(encoder, image_size=image_size)
            sizes: tuple[int, int] = (image_encoder.grid_size, image_encoder.image_size)  # type: ignore[assignment]
            prompt_encoder = build_prompt_encoder(grid_size=sizes[0], image_size=sizes[1])
            mask_decoder = build_mask_decoder(detail_channels=getattr(image_encoder, "detail_channels", ()))
        parts: dict[str, torch.nn.Module] = {"image_encoder": image_encoder, "prompt_encoder": prompt_encoder}
        parts["mask_decoder"] = mask_decoder
        path = self.folder / f"start_seed_{seed}_{encoder}_{sizes[1]}.pt"
        save_state_dict(torch.nn.ModuleDict(parts).state_dict(), path)
        return path


def _resolved(text: str) -> Path:
    """Evaluate a path that a config gives as an expression over `bundle_root`."""
    from monai.bundle import ConfigParser

    parser = ConfigParser({"bundle_root": str(BUNDLE_ROOT), "path": text})
    return Path(parser.get_parsed_content("path")).absolute()
