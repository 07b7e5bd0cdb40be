import dataclasses
import io
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from nemo_cosmos.tokenizer import published
from nemo_cosmos.tokenizer import state_dict as names
from nemo_cosmos.tokenizer.config import PRESETS, RELEASED, TokenizerConfig
from nemo_cosmos.tokenizer.torchscript_archive import read_torchscript
from tests.unit.tokenizer.conftest import CODE, random_tokenizer

VIDEO = TokenizerConfig(
    channels=8,
    channels_mult=(1, 1),
    num_res_blocks=1,
    latent_channels=4,
    patch_size=2,
    spatial_compression=4,
    temporal_compression=2,
)
IMAGE = dataclasses.replace(VIDEO, modality="image", channels=32, temporal_compression=1)
DISCRETE = dataclasses.replace(VIDEO, **CODE)
DISCRETE_IMAGE = dataclasses.replace(IMAGE, **CODE)
FAMILIES = [VIDEO, IMAGE, DISCRETE, DISCRETE_IMAGE]


class Holder(nn.Module):
    """A module of weights alone, as named as wished."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def holder_of(tensors: dict[str, torch.Tensor]) -> Holder:
    """The tree of modules whose state dict is `tensors`; floats become parameters."""
    root = Holder()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, Holder())
            module = getattr(module, part)
        if tensor.is_floating_point():
            module.register_parameter(leaf, nn.Parameter(tensor))
        else:
            module.register_buffer(leaf, tensor)
    return root


def write_published(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Writes `encoder.jit` by scripting and `decoder.jit` by tracing modules that know nothing of ours."""
    folder.mkdir()
    halves = {"encoder.jit": {}, "decoder.jit": {}}
    for name, tensor in tensors.items():
        if name.startswith("quantizer."):
            halves["decoder.jit"][f"inv_quant.{name}"] = tensor
        halves["decoder.jit" if name.startswith(("post_quant_conv.", "decoder.")) else "encoder.jit"][name] = tensor
    torch.jit.script(holder_of(halves["encoder.jit"])).save(str(folder / "encoder.jit"))
    torch.jit.trace(holder_of(halves["decoder.jit"]), torch.zeros(1)).save(str(folder / "decoder.jit"))
    return folder


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.family)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_halves_give_the_weights_bit_for_bit(
    config: TokenizerConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    ours = random_tokenizer(config).to(dtype).state_dict()
    tensors = names.to_reference_names(ours, config)
    found = published.read_weights(write_published(tmp_path / "folder", tensors))
    assert_same(found, tensors)
    assert_same(names.from_reference_names(found, config), ours)


def test_every_dtype_and_layout_of_a_tensor_is_read(tmp_path: Path) -> None:
    dtypes = (torch.float64, torch.float16, torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8, torch.bool)
    base = torch.arange(24).reshape(2, 3, 4) % 5
    tensors = {str(dtype).removeprefix("torch."): base.to(dtype) for dtype in dtypes}
    tensors |= {"turned": base.float().permute(2, 0, 1), "part": base.float()[1, 1:], "empty": torch.zeros(0, 3)}
    tensors["scalar"] = torch.tensor(3.0)
    torch.jit.script(holder_of(tensors)).save(str(tmp_path / "a.jit"))
    assert_same(read_torchscript(tmp_path / "a.jit"), tensors)


def test_a_whole_autoencoder_and_a_training_checkpoint_are_read(tmp_path: Path) -> None:
    tensors = names.to_reference_names(random_tokenizer(DISCRETE).state_dict(), DISCRETE)
    torch.jit.script(holder_of(tensors)).save(str(tmp_path / "autoencoder.jit"))
    assert published.is_published(tmp_path)
    assert_same(published.read_weights(tmp_path), tensors)
    (tmp_path / "autoencoder.jit").unlink()
    assert not published.is_published(tmp_path)
    old = {f"network.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items() if "quantizer" not in name}
    averages = {f"ema.{name.replace('.', '-')}": tensors[name.removeprefix("network.")] for name in old}
    torch.save({"model": old | averages, "iteration": 7}, tmp_path / "model.pt")
    assert_same(published.read_weights(tmp_path), {n: t for n, t in tensors.items() if "quantizer" not in n})
    torch.save({"model": old}, tmp_path / "model.pt")
    assert not any(tensor.any() for tensor in published.read_weights(tmp_path).values())


def test_halves_of_two_releases_are_refused(tmp_path: Path) -> None:
    tensors = names.to_reference_names(random_tokenizer(DISCRETE).state_dict(), DISCRETE)
    folder = write_published(tmp_path / "folder", tensors)
    other = {"inv_quant.quantizer._levels": tensors["quantizer._levels"] + 1}
    torch.jit.script(holder_of(other)).save(str(folder / "decoder.jit"))
    with pytest.raises(UserError, match="_levels differs between encoder.jit and decoder.jit"):
        published.read_weights(folder)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def replace_record(path: Path, name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Replaces what ends with `name` in a zip."""
    records = {}
    with zipfile.ZipFile(path) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for key, value in records.items():
            changed = key.endswith(name)
            new.writestr(key, content if changed else value, compression if changed else zipfile.ZIP_STORED)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "a.jit"
    torch.jit.script(holder_of({"weight": torch.arange(4.0)})).save(str(path))
    return path


def test_a_pickle_in_an_archive_is_refused_and_not_run(archive: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was_run"
    evil = pickle.dumps({"weight": Evil(trace)}, protocol=2)
    pickle.loads(evil)["weight"].close()
    assert trace.exists(), "the pickle does no harm, so the test shows nothing"
    trace.unlink()
    replace_record(archive, "/data.pkl", evil)
    with pytest.raises(UserError, match=r"data.pkl names \w+\.open, which no tensor needs"):
        read_torchscript(archive)
    assert not trace.exists()


@pytest.mark.parametrize(
    "call",
    [
        b"cbuiltins\neval\n(X\x04\x00\x00\x001+1\ntR.",
        b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
        b"ctorch\nload\n(X\x01\x00\x00\x00atR.",
        b"ctorch.jit._pickle\nbuiltins\n.",
        b"ccollections\nOrderedDict\n(ccollections\nCounter\ntR.",
        b"c__main__\nEvil\n.",
    ],
)
def test_names_beyond_those_of_tensors_are_refused(call: bytes, archive: Path) -> None:
    replace_record(archive, "/data.pkl", b"\x80\x02" + call)
    with pytest.raises(UserError, match="which no tensor needs; nothing was run"):
        read_torchscript(archive)


def test_broken_archives_are_refused(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_torchscript(tmp_path / "absent.jit")
    whole = archive.read_bytes()
    for content in (b"abc", whole[: len(whole) // 2]):
        archive.write_bytes(content)
        with pytest.raises(UserError, match="not a whole TorchScript archive"):
            read_torchscript(archive)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as empty:
        empty.writestr("a/other", b"")
    archive.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"holds no data\.pkl"):
        read_torchscript(archive)


def test_storages_that_do_not_hold_their_tensor_are_refused(archive: Path) -> None:
    replace_record(archive, "/data/0", b"\x00" * 8)
    with pytest.raises(UserError, match="does not fit its storage"):
        read_torchscript(archive)
    replace_record(archive, "/data/0", b"\x00" * 16, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is compressed"):
        read_torchscript(archive)


MODULE = b"c__torch__.a\nM\n)\x81"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def with_attribute(value: bytes) -> bytes:
    return MODULE + b"}" + text("t") + value + b"sb"


def tensor(size: bytes, stride: bytes) -> bytes:
    """Opcodes of a tensor of the archive's storage of four floats."""
    return REBUILD + STORAGE + b"K\x00" + size + stride + b"\x89)tR"


NESTED = b")q\x01" + b"h\x01h\x01\x86q\x01" * 40
"""2^40 empty tuples, of which the memory holds 40."""


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        pytest.param(b"(" + NESTED + b"NNNNtQ.", "not as torch writes it", id="nested storage"),
        pytest.param(NESTED + b"}h\x01Ns.", "not as torch writes it", id="nested key"),
        pytest.param(
            with_attribute(tensor(b"J\x00\x00\x00\x10" + text("a") + b"\x86", b"K\x01K\x01\x86")),
            "not as torch writes it",
            id="size of text",
        ),
        pytest.param(
            with_attribute(tensor(b"K\x01\x85", b"K\x01\x85") + b"(NK\x00K\x09\x85K\x01\x85tb") + b".",
            "not as torch writes it",
            id="state of a tensor",
        ),
        pytest.param(with_attribute(tensor(b"K\x02\x85", b"K\x04\x85")) + b".", "does not fit", id="stride"),
        pytest.param(b"Vabc\n.", "the opcode UNICODE, which torch never writes", id="opcode"),
        pytest.param(b"c" + b"a" * 9999 + b"\nb\n.", "which no tensor needs", id="long name"),
        pytest.param(b"h\x07.", r"not a whole TorchScript archive \(KeyError\)", id="memo"),
    ],
)
def test_pickles_that_would_do_harm_are_refused(pickled: bytes, message: str, archive: Path) -> None:
    replace_record(archive, "/data.pkl", b"\x80\x02" + pickled)
    with pytest.raises(UserError, match=message) as caught:
        read_torchscript(archive)
    assert len(str(caught.value)) < 500


def test_a_memo_has_no_room_but_for_what_it_holds(archive: Path) -> None:
    """CPython's unpickler allocates 16 bytes per index, 64 GB here."""
    code = with_attribute(tensor(b"K\x04\x85", b"K\x01\x85")) + b"r" + (2**32 - 1).to_bytes(4, "little") + b"."
    replace_record(archive, "/data.pkl", b"\x80\x02" + code)
    assert_same(read_torchscript(archive), {"t": torch.arange(4.0)})


def test_a_module_in_several_places_is_visited_once(archive: Path) -> None:
    shared = with_attribute(tensor(b"K\x04\x85", b"K\x01\x85")) + b"q\x01"
    # 2^16 paths to one tensor: fast enough to fail.
    levels = (MODULE + b"}(" + text("a") + b"h\x01" + text("b") + b"h\x01ubq\x01") * 16
    replace_record(archive, "/data.pkl", b"\x80\x02" + shared + levels + b".")
    assert_same(read_torchscript(archive), {"a." * 16 + "t": torch.arange(4.0)})


def test_tensors_much_larger_than_their_file_are_refused(archive: Path) -> None:
    def write(num_tensors: int) -> int:
        """Each of 4,000 bytes of one storage."""
        one = REBUILD + b"h\x01K\x00M\xe8\x03\x85K\x01\x85\x89)tR"
        items = b"".join(text(f"{i}") + one for i in range(num_tensors))
        replace_record(archive, "/data/0", bytes(4000))
        replace_record(archive, "/data.pkl", b"\x80\x02" + STORAGE + b"q\x01" + MODULE + b"}(" + items + b"ub.")
        return archive.stat().st_size

    assert write(3) > 4000
    assert len(read_torchscript(archive)) == 3
    assert write(30) < 30 * 1000
    with pytest.raises(UserError, match="several times larger than the file"):
        read_torchscript(archive)


def test_a_class_of_main_is_a_module(archive: Path) -> None:
    with zipfile.ZipFile(archive) as records:
        (pickled,) = (records.read(name) for name in records.namelist() if name.endswith("/data.pkl"))
    module, name = pickled[pickled.index(b"c__torch__") :].split(b"\n", 2)[:2]
    replace_record(archive, "/data.pkl", pickled.replace(module + b"\n" + name, b"c__torch__\nHolder"))
    assert_same(read_torchscript(archive), {"weight": torch.arange(4.0)})


def test_two_pickles_in_an_archive_are_told(archive: Path) -> None:
    with zipfile.ZipFile(archive, "a") as records:
        records.writestr("other/data.pkl", b"")
    with pytest.raises(UserError, match=r"holds 2 data\.pkl"):
        read_torchscript(archive)


def test_lack_of_memory_is_not_blamed_on_the_file(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(zipfile.ZipFile, "read", lack)
    with pytest.raises(MemoryError):
        read_torchscript(archive)


def test_links_and_caches_tell_their_release(tmp_path: Path) -> None:
    name = "Cosmos-Tokenize1-CV8x8x8-720p"
    snapshot = tmp_path / f"models--nvidia--{name}" / "snapshots" / "0a1b"
    blob = tmp_path / "blobs" / "0a1b"
    for folder in (snapshot, blob):
        folder.mkdir(parents=True)
    assert published.config_told_by(snapshot) == PRESETS["CV8x8x8-720p"]
    (tmp_path / name).symlink_to(blob)
    assert published.config_told_by(tmp_path / name) == PRESETS["CV8x8x8-720p"]
    (tmp_path / "mine").symlink_to(snapshot)
    assert published.config_told_by(tmp_path / "mine") == PRESETS["CV8x8x8-720p"]
    (tmp_path / "Cosmos-Tokenize1-CI8x8-360p").symlink_to(snapshot)
    with pytest.raises(UserError, match="the name of one release"):
        published.config_told_by(tmp_path / "Cosmos-Tokenize1-CI8x8-360p")


def test_a_folder_tells_its_release(tmp_path: Path) -> None:
    for name, preset in RELEASED.items():
        (tmp_path / name).mkdir()
        assert published.config_told_by(tmp_path / name) == PRESETS[preset]
        assert published.config_told_by(tmp_path / name / "model.pt") == PRESETS[preset]
    folder = tmp_path / "mine"
    folder.mkdir()
    assert published.config_told_by(folder) is None
    write_json(folder / "config.json", {"architectures": ["A"], "version": 1})
    assert published.config_told_by(folder) is None
    write_json(folder / "config.json", {"name": "nvidia/Cosmos-Tokenize1-DV4x8x8-360p"})
    assert published.config_told_by(folder) == PRESETS["DV4x8x8-360p"]
    write_json(folder / "config.json", DISCRETE_IMAGE.to_dict())
    assert published.config_told_by(folder) == DISCRETE_IMAGE
    torn = tmp_path / "Cosmos-Tokenize1-CI8x8-360p"
    write_json(torn / "config.json", {"name": "Cosmos-Tokenize1-CI16x16-360p"})
    with pytest.raises(UserError, match="the name of one release"):
        published.config_told_by(torn)


def test_a_folder_is_loaded_where_it_tells_its_release(tmp_path: Path) -> None:
    tokenizer = random_tokenizer(VIDEO)
    folder = write_published(tmp_path / "folder", names.to_reference_names(tokenizer.state_dict(), VIDEO))
    with pytest.raises(UserError, match="tells which release"):
        published.load(folder)
    write_json(folder / "config.json", VIDEO.to_dict())
    assert published.load(folder).fingerprint() == tokenizer.fingerprint()
    shutil.copy(folder / "encoder.jit", folder / "decoder.jit")
    with pytest.raises(UserError, match=r"missing \['decoder\.conv_in"):
        published.load(folder)
