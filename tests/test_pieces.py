"""What a run says of the papers' pieces that it has."""

from experiments import configs
from experiments.command import configuration_lines
from ultra_hstu.fields import changed
from ultra_hstu.pieces import pieces


def test_everything_has_every_piece():
    everything = configs.named("everything")
    assert pieces(everything) == [
        "stochastic length 1.8",
        "balanced load",
        "merged input",
        "window 128",
        "32 full rows",
        "256 events after 2 layers",
        "mixture of 2 transducers",
        "activations in bfloat16",
        "projections in fp8",
        "selective rematerialisation",
        "mini-sequences of 1024 rows",
        "4 devices share rows",
        "tables divided",
        "tables by rowwise_adagrad",
        "matrices divided",
    ]
    assert configuration_lines(everything)[-1].startswith("pieces: stochastic length 1.8, balanced")


def test_a_layer_may_have_a_window_of_its_own():
    config = changed(configs.named("ml1m_hstu"), model={"window": (-1, 8), "prefix": (2,)})
    assert pieces(config) == ["window -1/8", "prefix 2"]
    assert not pieces(configs.named("ml1m_hstu"))


def test_a_channel_may_have_a_window_and_a_truncation_of_its_own():
    everything = configs.named("everything")
    channels = everything.model.channels
    own = changed(channels["liked"], window=(-1,), truncate_after=1, truncate_length=64)
    found = pieces(changed(everything, model={"channels": channels | {"liked": own}}))
    assert found[3:8] == [
        "window 128 (ratings)",
        "32 full rows",
        "256 events after 2 layers (ratings)",
        "64 events after 1 layers (liked)",
        "mixture of 2 transducers",
    ]
    alone = {name: changed(channel, window=(16,)) for name, channel in channels.items()}
    found = pieces(changed(everything, model={"window": (), "channels": alone}))
    assert found[3] == "window 16"


def test_what_is_added_to_an_encoder_is_said():
    model = {"feed_forward": 200, "divide_by": "length", "dtype": "bfloat16"}
    model |= {"projection": "fp8", "projection_gradient": "fp8"}
    config = changed(
        configs.named("ml1m_hstu_large_mol"),
        model=model,
        loss={"chunk_rows": 512},
        optim={"state_dtype": "bfloat16"},
        parallel={"context": 2, "batches": "exchanged"},
    )
    assert pieces(config) == [
        "feed-forward blocks of width 200",
        "attention divided by each sequence's length",
        "mixture of logits",
        "activations in bfloat16",
        "projections and their gradients in fp8",
        "a loss in chunks of 512 rows",
        "optimizer's state in bfloat16",
        "2 devices share rows",
        "exchanged batches",
        "tables divided",
    ]
