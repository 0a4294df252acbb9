"""Which image belongs to which prompt."""

import pytest
import torch

from scripts.networks.prompts import images_of


@pytest.mark.parametrize(("images", "per_image"), [(1, 1), (1, 5), (3, 1), (3, 4)])
def test_prompts_lie_image_by_image(images, per_image, generator):
    values = torch.randn((images, 2, 3), generator=generator)
    repeated = values.repeat_interleave(per_image, dim=0)
    for first in range(images * per_image):
        for last in range(first + 1, images * per_image + 1):
            rows = slice(first, last)
            assert torch.equal(images_of(values, rows, per_image), repeated[rows])


def test_nothing_is_copied_where_nothing_is_repeated(generator):
    one, several = torch.randn((1, 2, 3), generator=generator), torch.randn((3, 2, 3), generator=generator)
    assert images_of(one, slice(0, 5), 5).data_ptr() == one.data_ptr()
    assert images_of(several, slice(1, 3), 1).data_ptr() == several[1:].data_ptr()
