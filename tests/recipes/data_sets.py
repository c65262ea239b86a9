"""Three rows of each data set that a ready recipe names, with its exact columns.

Texts and media are made up. A set of the hub is written as a folder of `save_to_disk` with its
splits; a file is written where the recipe looks for it, with its media.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from multi_token.testing.files import noise_frames, write_tone, write_video

Rows = list[dict[str, Any]]


def _image(number: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (40 + 8 * number, 30), (60 * number, 90, 20)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


def _audio(number: int, folder: Path) -> dict[str, Any]:
    path = folder / f"{number}.wav"
    write_tone(path, 0.5 + 0.2 * number)
    return {"bytes": path.read_bytes(), "path": path.name}


def _turns(question: str, answer: str) -> Rows:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _parts(role: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def _part(kind: str, text: str | None = None, index: int | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "type": kind}


def llava_next(number: int, _: Path) -> dict[str, Any]:
    """lmms-lab/LLaVA-NeXT-Data and LLaVA-OneVision-Data."""
    return {
        "id": f"{number:09}",
        "conversations": _turns("<image>\nWhat is shown?", f"a cat {number}"),
        "data_source": "coco",
        "image": _image(number),
    }


def pairs(number: int, _: Path) -> dict[str, Any]:
    """HuggingFaceM4/the_cauldron, Docmatix and FineVision."""
    asked = {"user": "What is it?", "assistant": f"a cat {number}", "source": "vqav2"}
    return {"images": [_image(number)], "texts": [asked, {**asked, "user": "And now?"}]}


def doc_vqa(number: int, _: Path) -> dict[str, Any]:
    """lmms-lab/DocVQA."""
    return {
        "questionId": str(number),
        "question": "What is the date?",
        "question_types": ["handwritten"],
        "image": _image(number),
        "docId": number,
        "ucsf_document_id": "x",
        "ucsf_document_page_no": "1",
        "answers": ["1/8/93", "1/8/1993"],
        "data_split": "val",
    }


def librispeech(number: int, folder: Path) -> dict[str, Any]:
    """openslr/librispeech_asr."""
    return {
        "file": f"{number}.flac",
        "audio": _audio(number, folder),
        "text": f"THE FIRST AND THE SECOND {number}",
        "speaker_id": 1,
        "chapter_id": 2,
        "id": f"1-2-{number}",
    }


def librispeech_continued(number: int, folder: Path) -> dict[str, Any]:
    """fixie-ai/librispeech_asr."""
    row = librispeech(number, folder)
    kept = {key: row[key] for key in ("audio", "text", "id")}
    return {**kept, "continuation": "and then it was a cat"}


def audiocaps(number: int, folder: Path) -> dict[str, Any]:
    """OpenSound/AudioCaps."""
    return {
        "audiocap_id": number,
        "youtube_id": f"y{number}",
        "start_time": 30,
        "audio": _audio(number, folder),
        "caption": f"A dog says {number}",
    }


def govreport(number: int, _: Path) -> dict[str, Any]:
    """ccdv/govreport-summarization."""
    return {"report": "The lamp is in Oslo. " * (20 + number), "summary": f"A lamp {number}."}


def llava_instruct_mix(number: int, _: Path) -> dict[str, Any]:
    """HuggingFaceH4/llava-instruct-mix-vsft."""
    user = _parts("user", _part("text", "What is this?"), _part("image", index=0))
    answer = _parts("assistant", _part("text", f"a cat {number}"))
    return {"messages": [user, answer], "images": [_image(number)]}


def rlaif_v(number: int, _: Path) -> dict[str, Any]:
    """HuggingFaceH4/rlaif-v_formatted."""

    def part(kind: str, text: str | None = None) -> dict[str, Any]:
        return {"text": text, "type": kind}

    return {
        "images": [_image(number)],
        "prompt": [_parts("user", part("image"), part("text", "What is this?"))],
        "chosen": [_parts("assistant", part("text", f"a cat {number}"))],
        "rejected": [_parts("assistant", part("text", f"a red dog {number}"))],
    }


HUB: dict[str, tuple[Callable[[int, Path], dict[str, Any]], tuple[str, ...]]] = {
    "lmms-lab/LLaVA-NeXT-Data": (llava_next, ("train",)),
    "HuggingFaceM4/the_cauldron": (pairs, ("train",)),
    "HuggingFaceM4/Docmatix": (pairs, ("train",)),
    "lmms-lab/DocVQA": (doc_vqa, ("validation", "test")),
    "openslr/librispeech_asr": (librispeech, ("train.100", "validation")),
    "fixie-ai/librispeech_asr": (librispeech_continued, ("train.360", "validation")),
    "OpenSound/AudioCaps": (audiocaps, ("train", "validation", "test")),
    "ccdv/govreport-summarization": (govreport, ("train", "validation", "test")),
    "HuggingFaceH4/llava-instruct-mix-vsft": (llava_instruct_mix, ("train", "test")),
    "HuggingFaceH4/rlaif-v_formatted": (rlaif_v, ("train", "test")),
}
"""Name on the hub -> its row and its splits."""


def write_hub(name: str, folder: Path) -> str:
    """Write a data set of the hub (`owner/name/config`) with its splits; return the folder."""
    row, splits = HUB["/".join(name.split("/")[:2])]
    folder.mkdir(parents=True)
    rows = [row(number, folder) for number in range(3)]
    found = datasets.Dataset.from_list(rows)
    saved = folder / "saved"
    datasets.DatasetDict(dict.fromkeys(splits, found)).save_to_disk(str(saved))
    return str(saved)


def _write_json(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))


def _save_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_image(number)["bytes"])


def llava_pretrain(path: Path) -> None:
    """liuhaotian/LLaVA-Pretrain, its images unzipped beside the JSON."""
    rows = []
    for number in range(3):
        name = f"00453/{number:09}.png"
        _save_image(path.parent / name, number)
        turns = _turns("Render a summary of the photo.\n<image>", f"a cat {number}")
        rows.append({"id": f"{number:09}", "image": name, "conversations": turns})
    _write_json(path, rows)


def llava_mix665k(path: Path) -> None:
    """llava_v1_5_mix665k.json, with a row of text alone."""
    rows: Rows = [{"id": "wg", "model": "", "conversations": _turns("Who?", "I am a cat.")}]
    for number in range(2):
        name = f"coco/train2017/{number:012}.png"
        _save_image(path.parent / name, number)
        turns = _turns("<image>\nWhat is it?", f"a cat {number}")
        rows.append({"id": f"{number:012}", "image": name, "conversations": turns})
    _write_json(path, rows)


def naming_rows(path: Path) -> None:
    """Rows of one's own: messages with a slot, and a list of images."""
    rows = []
    for number in range(20):
        _save_image(path.parent / f"own/{number}.png", number % 3)
        user = {"role": "user", "content": "What is <image>?"}
        answer = {"role": "assistant", "content": f"a cat {number}"}
        rows.append({"images": [f"own/{number}.png"], "messages": [user, answer]})
    _write_json(path, rows)


def images_with_captions(folder: Path) -> None:
    """A folder of x.png with x.txt."""
    for number in range(20):
        _save_image(folder / f"{number:02}.png", number % 3)
        (folder / f"{number:02}.txt").write_text(f"a cat {number}")


def llava_video(path: Path) -> None:
    """lmms-lab/LLaVA-Video-178K: LLaVA's slot, and the videos below `videos`."""
    rows = []
    for number in range(3):
        name = f"academic_source/{number}.mp4"
        (path.parent / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(path.parent / "videos" / name, noise_frames(20, seed=number))
        turns = _turns("<image>\nWhat happens?", f"a cat {number}")
        row = {"id": str(number), "conversations": turns, "data_source": "0_30_s_academic_v0_1"}
        rows.append({**row, "video": name})
    _write_json(path, rows)


def ptbxl(path: Path) -> None:
    """PTB-XL's table and three records of twelve leads in WFDB's format 16."""
    path.parent.mkdir(parents=True)
    columns = "ecg_id,patient_id,age,sex,report,scp_codes,strat_fold,filename_lr,filename_hr"
    lines = [columns]
    for number in range(3):
        name = f"records100/00000/{number:05}_lr"
        record = path.parent / name
        record.parent.mkdir(parents=True, exist_ok=True)
        steps = np.sin(np.arange(1000)[:, None] / (5 + np.arange(12) + number)) * 1000
        record.with_suffix(".dat").write_bytes(steps.astype("<i2").tobytes())
        leads = ["I", "II", "III", "AVR", "AVL", "AVF", *(f"V{i}" for i in range(1, 7))]
        head = [f"{record.name} 12 100 1000"]
        head += [f"{record.name}.dat 16 1000.0(0)/mV 16 0 0 0 0 {lead}" for lead in leads]
        record.with_suffix(".hea").write_text("\n".join(head) + "\n")
        codes = "\"{'NORM': 100.0, 'SR': 0.0}\""
        fold = 9 if number == 2 else 1
        lines.append(f'{number},1.0,56.0,1,"sinus rhythm, {number}",{codes},{fold},{name},{name}')
    path.write_text("\n".join(lines) + "\n")


def embeddings(path: Path) -> None:
    """A vector store's export."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).normal(size=(20, 768))
    labels = [f"a cat {number}" for number in range(20)]
    columns = {"embedding": values.tolist(), "text": labels, "label": labels}
    datasets.Dataset.from_dict(columns).to_parquet(str(path))


def img2dataset(folder: Path) -> None:
    """A shard of img2dataset: x.jpg, x.txt, x.json."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(3):
            image = io.BytesIO()
            Image.new("RGB", (40, 30), (60 * number, 9, 9)).save(image, "JPEG")
            caption = f"a cat {number}"
            about = {"caption": caption, "url": "http://x", "key": f"{number:09}", "width": 40}
            texts = {"jpg": image.getvalue(), "txt": caption.encode()}
            for suffix, body in {**texts, "json": json.dumps(about).encode()}.items():
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))


FILES: dict[str, Callable[[Path], None]] = {
    "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": llava_pretrain,
    "data/llava_v1_5_mix665k.json": llava_mix665k,
    "data/captions.jsonl": naming_rows,
    "data/conversations.jsonl": naming_rows,
    "data/held_out.jsonl": naming_rows,
    "data/rows.jsonl": naming_rows,
    "data/images": images_with_captions,
    "data/0_30_s_academic_v0_1_oe_qa.json": llava_video,
    "data/0_30_s_academic_v0_1_cap.json": llava_video,
    "data/ptbxl/ptbxl_database.csv": ptbxl,
    "data/embeddings.parquet": embeddings,
    "data/shards/*.tar": lambda path: img2dataset(path.parent),
}
"""Name of rows in a recipe -> writer of that file or folder."""
