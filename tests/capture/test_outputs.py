"""BlockOutputs: the tokens of chosen blocks, which of them are what, and nothing of other threads' forwards."""

import copy
import pickle
import threading

import pytest
import timm
import torch

from attnkd.capture.outputs import BlockOutputs


def vit(**options):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 4, **options}
    ).eval()


def test_tokens_and_what_they_are():
    model, x = vit(reg_tokens=2), torch.randn(2, 3, 32, 32)
    outputs = BlockOutputs(model, ["blocks.2", "blocks.0"])
    for run in (outputs, copy.deepcopy(outputs), pickle.loads(pickle.dumps(outputs))):
        scores, (last, first) = run(x)
        torch.testing.assert_close(scores, model(x))
        torch.testing.assert_close(last.tokens, model.blocks(model._pos_embed(model.patch_embed(x))))
        assert first[1:] == last[1:] == (3, True, (4, 4), None)
        assert all(keeper.kept.runs is None for keeper in run.hooks.keepers), "nothing is kept after a forward"


def test_class_tokens_that_come_late():
    """ConViT adds its class token after ten blocks: what is before it is a patch, though model.cls_token exists."""
    model = timm.create_model("convit_tiny", img_size=32, patch_size=8, num_classes=4).eval()
    _, (early, late) = BlockOutputs(model, ["blocks.3", "blocks.11"])(torch.randn(2, 3, 32, 32))
    assert early[1:] == (0, False, (4, 4), None) and late[1:] == (1, True, (4, 4), None)


def test_a_block_that_runs_twice_is_refused():
    model = vit()
    model.blocks[2] = model.blocks[0]
    with pytest.raises(RuntimeError, match="blocks.0 of VisionTransformer: ran 2 times"):
        BlockOutputs(model, ["blocks.0"])(torch.randn(2, 3, 32, 32))


def test_other_threads_run_the_same_model():
    model, wrong = vit(), []
    outputs = BlockOutputs(model, ["blocks.0", "blocks.1"])
    batches = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with torch.no_grad():
        expected = [[block.tokens for block in outputs(x)[1]] for x in batches]

    def run(number):
        with torch.no_grad():
            for turn in range(30):
                index = (turn + number) % 3
                try:
                    found = [] if number == 0 else [block.tokens for block in outputs(batches[index])[1]]
                    model(batches[index])
                except RuntimeError as error:
                    wrong.append(error)
                else:
                    wrong.extend(a for a, b in zip(found, expected[index], strict=False) if not torch.equal(a, b))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
