# ruff: noqa: E501 - rows as their data sets have them
"""More rows of real data sets: sound, video, series, vectors, preferences, summaries."""

from __future__ import annotations

from tests.data.row_shapes import AUDIO, CONVERSATIONS, IMAGE, Shape

SHAPES = [
    *CONVERSATIONS,
    Shape(
        "Common Voice",
        ["speech"],
        {
            "client_id": "c",
            "path": "a.mp3",
            "audio": AUDIO,
            "sentence": "Turn it on.",
            "locale": "en",
        },
        "user: <speech b'RIFF'>\nWrite down what is said. | assistant: Turn it on.",
        format="transcripts",
    ),
    Shape(
        "LibriSpeech",
        ["speech"],
        {
            "file": "a.flac",
            "audio": AUDIO,
            "text": "MISTER QUILTER",
            "speaker_id": 1,
            "chapter_id": 2,
            "id": "1-2-3",
        },
        "user: <speech b'RIFF'>\nWrite down what is said. | assistant: MISTER QUILTER",
        format="transcripts",
    ),
    Shape(
        "fixie-ai/librispeech_asr (continuation)",
        ["speech"],
        {"audio": AUDIO, "text": "mister quilter", "continuation": "...", "id": "1"},
        "user: <speech b'RIFF'>\nWrite down what is said. | assistant: mister quilter",
        format="transcripts",
    ),
    Shape(
        "messages + `audio` column, modality named speech",
        ["speech"],
        {
            "audio": AUDIO,
            "messages": [
                {"role": "user", "content": "<speech>"},
                {"role": "assistant", "content": "a"},
            ],
        },
        "user: <speech b'RIFF'> | assistant: a",
        format="messages",
    ),
    Shape(
        "messages + `audios` column, modality named audio",
        ["audio"],
        {
            "audios": ["a.wav"],
            "messages": [
                {"role": "user", "content": "<audio>What?"},
                {"role": "assistant", "content": "a"},
            ],
        },
        "user: <audio 'a.wav'>What? | assistant: a",
    ),
    Shape(
        "AudioCaps",
        ["sound"],
        {
            "audiocap_id": 1,
            "youtube_id": "y",
            "start_time": 3,
            "audio": AUDIO,
            "caption": "A dog barks.",
        },
        "user: <sound b'RIFF'>\nDescribe the sound. | assistant: A dog barks.",
        format="captions",
    ),
    Shape(
        "LLaVA-Video-178K",
        ["video"],
        {
            "id": "1",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat happens?"},
                {"from": "gpt", "value": "A man runs."},
            ],
            "data_source": "0_30_s_academic_v0_1",
            "video": "academic_source/a.mp4",
        },
        "user: <video 'academic_source/a.mp4'>\nWhat happens? | assistant: A man runs.",
        format="sharegpt",
    ),
    Shape(
        "LLaVA-Video-178K, modality named image",
        ["image=video"],
        {
            "id": "1",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat happens?"},
                {"from": "gpt", "value": "A man runs."},
            ],
            "video": "academic_source/a.mp4",
        },
        "user: <image 'academic_source/a.mp4'>\nWhat happens? | assistant: A man runs.",
        format="sharegpt",
    ),
    Shape(
        "Video-ChatGPT",
        ["video"],
        {"q": "What?", "a": "x", "video_id": "v_1"},
        "user: <video 'videos/v_1.mp4'>\nWhat? | assistant: x",
        source={"media": {"video": "videos/{{ video_id }}.mp4"}},
        format="qa",
    ),
    Shape(
        "ECG-QA",
        ["ecg"],
        {
            "template_id": 1,
            "question_id": 0,
            "sample_id": 0,
            "question_type": "single-verify",
            "attribute_type": "scp_code",
            "question": "Is there evidence of non-diagnostic t abnormalities on this ECG?",
            "answer": ["yes"],
            "ecg_id": [12662],
            "attribute": ["non-diagnostic t abnormalities"],
        },
        "user: <ecg 'records100/12000/12662_lr'>\nIs there evidence of non-diagnostic t abnormalities on this ECG? | assistant: yes",
        source={
            "media": {
                "ecg": "records100/{{ '%05d' % (ecg_id[0] // 1000 * 1000) }}/{{ '%05d' % ecg_id[0] }}_lr"
            }
        },
        format="qa",
    ),
    Shape(
        "PTB-XL row",
        ["ecg"],
        {
            "ecg_id": 1,
            "report": "sinusrhythmus",
            "scp_codes": "{'NORM': 100.0}",
            "filename_hr": "records500/00000/00001_hr",
            "strat_fold": 3,
        },
        "user: <ecg 'records500/00000/00001_hr'>\nDescribe the ecg. | assistant: sinusrhythmus",
        source={"media": {"ecg": "filename_hr"}, "where": "strat_fold < 9"},
        format="captions",
    ),
    Shape(
        "vectors parquet (embedding,text)",
        ["vector"],
        {"embedding": [0.1, 0.2], "text": "aspirin", "label": "x"},
        "user: <vector [0.1, 0.2]>\nDescribe the vector. | assistant: aspirin",
        format="captions",
    ),
    Shape(
        "RLAIF-V",
        ["image"],
        {
            "ds_name": "d",
            "image": IMAGE,
            "question": "What?",
            "chosen": "A cat.",
            "rejected": "A dog.",
            "idx": 0,
            "image_path": "x.jpg",
        },
        "user: <image b'\\x89PNG'>\nWhat? | assistant: A cat. | rejected: A dog.",
        format="preferences",
    ),
    Shape(
        "rlaif-v_formatted (TRL)",
        ["image"],
        {
            "images": [IMAGE],
            "prompt": [
                {
                    "role": "user",
                    "content": [{"text": None, "type": "image"}, {"text": "What?", "type": "text"}],
                }
            ],
            "chosen": [{"role": "assistant", "content": [{"text": "A cat.", "type": "text"}]}],
            "rejected": [{"role": "assistant", "content": [{"text": "A dog.", "type": "text"}]}],
        },
        "user: <image b'\\x89PNG'>What? | assistant: A cat. | rejected: A dog.",
    ),
    Shape(
        "llamafactory/RLHF-V",
        ["image"],
        {
            "conversations": [{"from": "human", "value": "<image>What?"}],
            "chosen": {"from": "gpt", "value": "A cat."},
            "rejected": {"from": "gpt", "value": "A dog."},
            "images": [IMAGE],
        },
        "user: <image b'\\x89PNG'>What? | assistant: A cat. | rejected: A dog.",
    ),
    Shape(
        "RLHF-V (json in text)",
        ["image"],
        {"image": IMAGE, "text": '{"question":"What?","chosen":"A","rejected":"B"}', "idx": 0},
        "user: <image b'\\x89PNG'>What? | assistant: A | rejected: B",
        source={
            "turns": [
                {"user": "<image>{{ (text | fromjson).question }}"},
                {"chosen": "{{ (text | fromjson).chosen }}"},
                {"rejected": "{{ (text | fromjson).rejected }}"},
            ]
        },
    ),
    Shape(
        "summaries (article, highlights)",
        ["document"],
        {"article": "Long ...", "highlights": "Short.", "id": "1"},
        "user: <document {'text': 'Long ...'}>\nSummarize the document. | assistant: Short.",
        format="summaries",
    ),
]
