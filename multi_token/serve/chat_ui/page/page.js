// The chat page: files, recordings and text become requests to /v1/chat/completions.
//
// No framework, and no network but this server. Names, messages and answers enter the page as text
// nodes, never as HTML, so nothing in them can run.
"use strict";

const STORED_KEY = "multi_token.key";
const $ = (id) => document.getElementById(id);

let facts = null; // JSON of /page/facts
let turns = []; // {role, parts}: the conversation, without turns that failed
let waiting = []; // media parts of the next message
let running = null; // AbortController of the running request
let recording = null; // MediaRecorder
let reading = 0; // number of files that are being read
let asking = null; // promise of the open key dialog
let key = sessionStorage.getItem(STORED_KEY);

class Refused extends Error {}

/** Create an element; strings among its children become text nodes. */
function el(tag, fields = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(fields)) {
    if (name === "role" || name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

// ---- the server

/** fetch with the API key; asks for the key again after each 401. */
async function call(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers };
    const used = key;
    if (used) headers.Authorization = `Bearer ${used}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The server cannot be reached. Is it still running?");
    }
    if (response.status !== 401) return response;
    if (used === key) {
      // Several requests may get 401 at once; all of them wait for one dialog.
      asking ||= askForKey(Boolean(used)).finally(() => (asking = null));
      await asking;
    }
    options.signal?.throwIfAborted();
  }
}

async function askForKey(wasRefused) {
  const dialog = $("key-dialog");
  $("key-note").textContent = wasRefused
    ? "This API key is invalid. Try another one."
    : "The key is kept until this tab is closed.";
  $("key-note").classList.toggle("refused", wasRefused);
  $("key").value = "";
  dialog.showModal();
  $("key").focus();
  key = await new Promise((resolve) => {
    dialog.oncancel = (event) => event.preventDefault();
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      // fetch throws for other characters in a header; pasted keys often end with a line break.
      const given = $("key").value.replace(/[^\x21-\x7e]/g, "");
      if (given) resolve(given);
    };
  });
  sessionStorage.setItem(STORED_KEY, key);
  dialog.close();
}

/** The error message of a response, as a sentence. */
async function sentenceOf(response) {
  let message = null;
  try {
    message = (await response.json()).error.message;
  } catch {
    message = null; // not our JSON: a proxy answered
  }
  return sentence(message || `The server responded with status ${response.status}.`);
}

function sentence(text) {
  const capitalized = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(capitalized) ? capitalized : `${capitalized}.`;
}

/** Yield the objects of a stream of server-sent events, up to [DONE]. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      // Without [DONE] the stream was cut off, even if it ended without an error.
      if (done) throw new Refused("The connection ended before the answer was complete.");
      const pieces = (rest + value).split("\n\n");
      rest = pieces.pop();
      for (const piece of pieces) {
        const data = piece.split("\n").filter((line) => line.startsWith("data:"));
        const text = data.map((line) => line.slice(5).trimStart()).join("\n");
        if (text === "[DONE]") return;
        if (text) yield JSON.parse(text);
      }
    }
  } finally {
    // Frees the connection when the caller stops early; a browser opens only six per server.
    reader.cancel().catch(() => {});
  }
}

// ---- files

const suffixOf = (name) => (/\.[^./\\]+$/.exec(name) || [""])[0].toLowerCase();

function kindOfType(type) {
  if (type === "application/pdf") return "document";
  const [family] = type.split("/");
  return ["image", "audio", "video"].includes(family) ? family : null;
}

/** Modalities that take a file, best match of its type first; .webm may be video or audio. */
function modalitiesFor(file) {
  const suffix = suffixOf(file.name);
  const kind = kindOfType(file.type);
  const fits = (modality) =>
    modality.takes.length === 0 ||
    modality.takes.some((t) => t.suffixes.includes(suffix) || (suffix === "" && t.kind === kind));
  const score = (modality) => Number(modality.takes.some((t) => t.kind === kind));
  return facts.modalities.filter(fits).sort((a, b) => score(b) - score(a));
}

function supportedFiles() {
  const described = facts.modalities.map((modality) => {
    const files = modality.takes.map((t) => `${t.noun} (${t.suffixes.join(" ")})`);
    return `${modality.name}: ${files.join(", ") || "any file"}`;
  });
  return described.length ? `It takes ${described.join("; ")}.` : "It takes text only.";
}

async function addFiles(files, only = null) {
  note("");
  for (const file of files) {
    const modalities = modalitiesFor(file).filter((m) => only === null || m.name === only);
    const problem = refusal(file, modalities, only);
    if (problem) {
      note(problem);
      continue;
    }
    reading += 1;
    refresh();
    try {
      waiting.push(await partOf(file, modalities));
    } catch (error) {
      note(error instanceof Refused ? error.message : `“${file.name}” cannot be read.`);
    } finally {
      reading -= 1;
      refresh();
    }
  }
  $("text").focus();
}

function refusal(file, modalities, only) {
  if (!modalities.length) {
    const subject = only ? `The modality ${only}` : "This model";
    return `${subject} does not take “${file.name}”. ${supportedFiles()}`;
  }
  if (file.size === 0) return `“${file.name}” is empty.`;
  if (file.size > mostBytes()) {
    return `“${file.name}” has ${size(file.size)}; this server takes ${size(mostBytes())}.`;
  }
  if (waiting.length + reading >= facts.max_media) {
    return `This server takes ${facts.max_media} items in a conversation.`;
  }
  return "";
}

/** Largest file of a request: base64 takes 4/3 of its bytes, and the rest is for the text. */
const mostBytes = () => Math.floor(facts.max_body_bytes * 0.74);

async function partOf(file, modalities) {
  const shown = await shownAs(file, modalities);
  const part = {
    kind: "media",
    name: file.name,
    modality: modalities[0].name,
    modalities: modalities.map((modality) => modality.name),
    shown,
    size: size(file.size),
    url: shown === "file" ? null : URL.createObjectURL(file),
  };
  const suffix = suffixOf(file.name);
  const takesNumbers = modalities[0].takes.some(
    (t) => t.kind === "numbers" && t.suffixes.includes(suffix),
  );
  if (takesNumbers && [".json", ".csv", ".txt"].includes(suffix)) {
    part.data = numbersOf(await file.text(), file.name);
    part.size = `${part.data.flat().length} numbers`;
  } else {
    part.data = await base64(file);
  }
  return part;
}

async function shownAs(file, modalities) {
  const kinds = modalities[0].takes.filter((t) => t.suffixes.includes(suffixOf(file.name)));
  const kind = kindOfType(file.type) || kinds[0]?.kind;
  if (kind === "image") return (await isShowableImage(file)) ? "image" : "file";
  return ["audio", "video"].includes(kind) ? kind : "file";
}

/** Whether this browser can decode the image; the server may decode more formats. */
async function isShowableImage(file) {
  try {
    (await createImageBitmap(file)).close();
    return true;
  } catch {
    return false;
  }
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** Parse numbers from JSON or from a table: one list, or a list of rows. */
function numbersOf(text, name) {
  const wrong = new Refused(
    `“${name}” should hold numbers: a JSON list, or lines of numbers separated by commas.`,
  );
  let rows;
  if (/^\s*\[/.test(text)) {
    try {
      rows = JSON.parse(text);
    } catch {
      throw wrong;
    }
    if (rows.length && rows.every((value) => typeof value === "number")) return rows;
  } else {
    const lines = text.split(/\r?\n/).filter((line) => line.trim());
    rows = lines.map((line) => line.trim().split(/[\s,;]+/).map(Number));
    if (rows.length > 1 && rows[0].every(Number.isNaN)) rows.shift(); // column names
  }
  const width = rows[0]?.length;
  const isTable = rows.every(
    (row) => Array.isArray(row) && row.length === width && row.every(Number.isFinite),
  );
  if (!width || !isTable) throw wrong;
  return rows.length === 1 || width === 1 ? rows.flat() : rows;
}

function size(numBytes) {
  if (numBytes < 1000) return `${numBytes} bytes`;
  const [value, unit] = numBytes < 1e6 ? [numBytes / 1e3, "kB"] : [numBytes / 1e6, "MB"];
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ${unit}`;
}

// ---- the microphone

async function record() {
  if (recording) {
    recording.stop();
    return;
  }
  note("");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch {
    note("The microphone cannot be used. Allow this page to use it in the browser.");
    return;
  }
  const chunks = [];
  const began = performance.now();
  const timer = setInterval(() => {
    $("recorded").textContent = `${Math.floor((performance.now() - began) / 1000)} s`;
  }, 250);
  recording = new MediaRecorder(stream);
  recording.ondataavailable = (event) => chunks.push(event.data);
  recording.onstop = async () => {
    clearInterval(timer);
    stream.getTracks().forEach((track) => track.stop());
    const { mimeType } = recording;
    recording = null;
    $("recorded").textContent = "";
    refresh();
    try {
      const wav = await asWav(new Blob(chunks, { type: mimeType }));
      const takesAudio = (modality) => modality.takes.some((t) => t.kind === "audio");
      const modalities = facts.modalities.filter(takesAudio);
      const file = new File([wav], "recording.wav", { type: "audio/wav" });
      await addFiles([file], modalities.length === 1 ? modalities[0].name : null);
    } catch {
      note("The recording is empty; try again, a little longer.");
    }
  };
  recording.start();
  refresh();
}

/** Convert a recording to WAV (mono, 16 bit). */
async function asWav(blob) {
  // Browsers record WebM or MP4, which libsndfile, the server's audio decoder, cannot read.
  const context = new AudioContext();
  const sound = await context.decodeAudioData(await blob.arrayBuffer());
  await context.close();
  const channels = Array.from({ length: sound.numberOfChannels }, (_, i) => sound.getChannelData(i));
  const view = new DataView(new ArrayBuffer(44 + 2 * sound.length));
  const letters = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  letters(0, "RIFF");
  view.setUint32(4, 36 + 2 * sound.length, true);
  letters(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, sound.sampleRate, true);
  view.setUint32(28, 2 * sound.sampleRate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  letters(36, "data");
  view.setUint32(40, 2 * sound.length, true);
  for (let i = 0; i < sound.length; i += 1) {
    const mean = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
    view.setInt16(44 + 2 * i, 32767 * Math.max(-1, Math.min(1, mean)), true);
  }
  return view.buffer;
}

// ---- the conversation

/** Content of a turn in a request. */
function contentOf(turn) {
  if (turn.parts.every((part) => part.kind === "text")) {
    return turn.parts.map((part) => part.text).join("");
  }
  return turn.parts.map((part) =>
    part.kind === "text"
      ? { type: "text", text: part.text }
      : { type: "media", modality: part.modality, data: part.data },
  );
}

function requestOf(turn) {
  const messages = [...turns, turn].map((t) => ({ role: t.role, content: contentOf(t) }));
  const system = $("system").value;
  if (system.trim()) messages.unshift({ role: "system", content: system });
  const longest = Number($("max-tokens").value);
  return {
    model: facts.name,
    messages,
    ...(longest ? { max_tokens: longest } : {}), // without it: the server's default
    temperature: Number($("temperature").value) || 0,
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** Send a message and show its answer while it streams. */
async function send(parts) {
  if (running) return;
  note("");
  const turn = { role: "user", parts };
  const asked = show(turn);
  const answer = el("li", { className: "turn assistant waiting" });
  const words = el("div", { className: "words" });
  answer.append(words);
  $("turns").append(answer);
  $("welcome").hidden = true;
  running = new AbortController();
  const { signal } = running;
  refresh();
  scrollDown(true);
  let text = "";
  let problem = "";
  const began = performance.now();
  const times = { first: 0, last: 0 };
  let usage = null;
  let finish = null;
  try {
    const body = JSON.stringify(requestOf(turn));
    if (body.length > facts.max_body_bytes) {
      throw new Refused(
        `This conversation has ${size(body.length)} with its media; the server's limit is ` +
          `${size(facts.max_body_bytes)}. Start a new one.`,
      );
    }
    const headers = { "Content-Type": "application/json" };
    const response = await call("v1/chat/completions", { method: "POST", headers, body, signal });
    if (!response.ok) throw new Refused(await sentenceOf(response));
    for await (const event of eventsOf(response.body)) {
      if (event.error) throw new Refused(sentence(event.error.message));
      usage = event.usage || usage;
      const [choice] = event.choices;
      finish = choice?.finish_reason || finish;
      const delta = choice?.delta?.content;
      if (!delta) continue;
      times.last = performance.now();
      times.first ||= times.last;
      text += delta;
      words.append(delta);
      scrollDown();
    }
  } catch (error) {
    if (signal.aborted) finish = "stopped";
    else if (error instanceof Refused) problem = error.message;
    else problem = "The connection ended before the answer was complete.";
  }
  // A new conversation was started meanwhile: this answer must not become part of it.
  if (!answer.isConnected) return;
  running = null;
  answer.classList.remove("waiting");
  if (problem) {
    answer.append(el("p", { className: "fault", role: "alert" }, problem));
    const again = el("button", { className: "again", type: "button" }, "Try again");
    again.onclick = () => {
      if (running) return;
      asked.remove();
      answer.remove();
      send(parts);
    };
    answer.append(again);
  } else {
    answer.append(el("p", { className: "after" }, remark(text, finish, usage, times, began)));
    if (text) turns.push(turn, { role: "assistant", parts: [{ kind: "text", text }] });
    $("spoken").textContent = text;
  }
  refresh();
  scrollDown();
  if (matchMedia("(hover: hover)").matches) $("text").focus();
}

/** The line below an answer: how it ended, token counts, times. */
function remark(text, finish, usage, times, began) {
  const notes = [];
  if (finish === "stopped") notes.push("Stopped");
  else if (!text) notes.push("An empty answer");
  else if (finish === "length") notes.push("Cut off at the token limit");
  if (usage) {
    const media = Object.entries(usage.prompt_tokens_details?.media_tokens || {});
    notes.push(...media.map(([name, number]) => `${name} ${number} tokens`));
    const seconds = (times.last - times.first) / 1000;
    const number = usage.completion_tokens;
    const speed = seconds > 0.05 && number > 2 ? `, ${((number - 1) / seconds).toFixed(0)} a second` : "";
    notes.push(`answer ${number} token${number === 1 ? "" : "s"}${speed}`);
  }
  if (times.first) notes.push(`first after ${((times.first - began) / 1000).toFixed(2)} s`);
  return notes.join(" · ");
}

/** Add a turn's media and text to the conversation. */
function show(turn) {
  const node = el("li", { className: `turn ${turn.role}` });
  const media = turn.parts.filter((part) => part.kind === "media");
  if (media.length) node.append(el("div", { className: "items" }, ...media.map(player)));
  const words = wordsOf(turn.parts);
  if (words.length) node.append(el("div", { className: "words" }, ...words));
  $("turns").append(node);
  return node;
}

/** Text of a turn. Media are shown above it; a slot marks those in the middle of the text. */
function wordsOf(parts) {
  const isBlank = (part) => part.kind === "media" || !part.text.trim();
  const first = parts.findIndex((part) => !isBlank(part));
  const last = parts.length - 1 - [...parts].reverse().findIndex((part) => !isBlank(part));
  if (first < 0) return [];
  return parts.slice(first, last + 1).map((part, i, inner) => {
    if (part.kind === "media") return el("span", { className: "slot" }, `‹${part.modality}›`);
    let { text } = part;
    if (i === 0) text = text.trimStart();
    if (i === inner.length - 1) text = text.trimEnd();
    return text;
  });
}

function player(part) {
  if (part.shown === "image") return el("img", { src: part.url, alt: part.name });
  if (part.shown === "audio") {
    return el("audio", { src: part.url, controls: true, "aria-label": part.name });
  }
  if (part.shown === "video") {
    return el("video", { src: part.url, controls: true, muted: true, "aria-label": part.name });
  }
  return el("span", { className: "file" }, part.name, el("small", {}, part.size || ""));
}

function startNew() {
  running?.abort();
  running = null;
  turns = [];
  waiting = [];
  $("turns").replaceChildren();
  $("spoken").textContent = "";
  $("welcome").hidden = false;
  $("system").value = facts?.system || "";
  note("");
  refresh();
  $("text").focus();
}

/** Parts of the next message: each item on its own line, then the text. */
function composed() {
  const text = $("text").value.trim();
  const lines = waiting.flatMap((part) => [part, { kind: "text", text: "\n" }]);
  if (!text) lines.pop();
  return text ? [...lines, { kind: "text", text }] : lines;
}

// ---- rendering

function note(text) {
  $("note").textContent = text;
  $("note").hidden = !text;
}

function refresh() {
  const isEmpty = !$("text").value.trim() && !waiting.length;
  document.body.classList.toggle("chatting", $("welcome").hidden);
  $("send").hidden = Boolean(running);
  $("send").disabled = isEmpty || !facts || reading > 0;
  $("stop").hidden = !running;
  $("new").hidden = !$("turns").childElementCount;
  $("record").setAttribute("aria-pressed", String(Boolean(recording)));
  $("record").setAttribute("aria-label", recording ? "Stop recording" : "Record audio");
  $("waiting").hidden = !waiting.length;
  $("waiting").replaceChildren(...waiting.map(itemOf));
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
  if ($("welcome").hidden) scrollDown(); // a growing text field would cover the answer
}

function itemOf(part) {
  const label = el("span", { className: "label" }, el("span", { title: part.name }, part.name));
  if (part.modalities.length > 1) {
    const select = el("select", { "aria-label": `Modality for ${part.name}` });
    select.append(...part.modalities.map((name) => el("option", { value: name }, name)));
    select.value = part.modality;
    select.onchange = () => (part.modality = select.value);
    label.append(select);
  } else {
    label.append(el("small", {}, `${part.modality}, ${part.size}`));
  }
  const remove = el("button", {
    className: "round remove",
    type: "button",
    "aria-label": `Remove ${part.name}`,
  });
  remove.append(cross());
  remove.onclick = () => {
    waiting = waiting.filter((other) => other !== part);
    refresh();
    $("text").focus();
  };
  const shown = part.shown === "file" ? [] : [player(part)];
  if (part.shown === "video") shown[0].controls = false; // the thumbnail is too small
  return el("li", { className: "item" }, ...shown, label, remove);
}

function cross() {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", "M6 6l12 12M18 6L6 18");
  svg.append(path);
  return svg;
}

/** Scroll to the end of the answer, unless the user has scrolled up. */
function scrollDown(always = false) {
  const { scrollHeight, scrollTop, clientHeight } = document.documentElement;
  if (always || scrollHeight - scrollTop - clientHeight < 160) {
    window.scrollTo({ top: scrollHeight });
  }
}

function showFacts() {
  document.title = `${facts.name} · multi_token`;
  $("name").textContent = facts.name;
  const nouns = [...new Set(facts.modalities.flatMap((s) => s.takes.map((t) => t.noun)))];
  const named = new Intl.ListFormat("en", { type: "conjunction" }).format(nouns);
  $("claim").textContent = nouns.length
    ? `A language model that also takes ${named}. Drop files anywhere on this page, and ask.`
    : "Ask something.";
  $("modalities").replaceChildren(
    ...facts.modalities.map((modality) => {
      const what = modality.takes.map((t) => t.noun).join(", ") || "files";
      const button = el("button", { type: "button", title: `Attach ${what}` }, modality.name);
      button.setAttribute("aria-label", `${modality.name}: attach ${what}`);
      button.onclick = () => pick(modality);
      return el("li", {}, button);
    }),
  );
  $("attach").hidden = !facts.modalities.length;
  const takesAudio = facts.modalities.some((s) => s.takes.some((t) => t.kind === "audio"));
  $("record").hidden = !takesAudio || !navigator.mediaDevices || !window.MediaRecorder;
  $("system").value = facts.system || "";
  $("max-tokens").placeholder = facts.default_max_tokens;
  $("report").hidden = !facts.report;
  if (facts.report) $("report").href = facts.report;
}

function pick(modality) {
  const modalities = modality ? [modality] : facts.modalities;
  const anything = modalities.some((s) => !s.takes.length);
  const suffixes = modalities.flatMap((s) => s.takes.flatMap((t) => t.suffixes));
  $("files").accept = anything ? "" : [...new Set(suffixes)].join(",");
  $("files").onchange = () => {
    addFiles([...$("files").files], modality?.name);
    $("files").value = "";
  };
  $("files").click();
}

async function showExamples() {
  for (const example of facts.examples) {
    try {
      const card = await cardOf(example);
      $("examples").append(el("li", {}, card));
      $("examples").hidden = $("examples-title").hidden = false;
    } catch (error) {
      if (!(error instanceof Refused)) throw error; // an example that fails to load is left out
    }
  }
}

async function cardOf(example) {
  const parts = [];
  for (const part of example.parts) {
    if (part.text !== undefined) {
      parts.push({ kind: "text", text: part.text });
      continue;
    }
    const response = await call(`page/examples/${part.item}`);
    if (!response.ok) throw new Refused(await sentenceOf(response));
    const blob = await response.blob();
    const data = await base64(blob);
    const url = URL.createObjectURL(blob);
    parts.push({ ...part, kind: "media", name: part.modality, size: size(blob.size), data, url });
  }
  const question = el("span", { className: "question" }, ...wordsOf(parts));
  const media = parts.filter((part) => part.kind === "media");
  const shown = media.map((part) => {
    if (part.shown === "image") return el("img", { src: part.url, alt: "" });
    return el("span", { className: "file" }, part.modality, el("small", {}, part.size));
  });
  const card = el("button", { className: "example", type: "button" });
  if (shown.length) card.append(el("span", { className: "items" }, ...shown));
  card.append(question);
  if (example.answer) {
    const held = example.held_out ? " (held out)" : "";
    card.append(el("span", { className: "expected" }, `expected${held}: ${example.answer}`));
  }
  card.onclick = () => {
    if (running) return;
    startNew();
    $("system").value = example.system || "";
    send(parts);
  };
  return card;
}

// ---- events

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const parts = composed();
  if (!parts.length || running || !facts || reading) return;
  const number = [...turns, { parts }].flatMap((t) => t.parts).filter((p) => p.kind === "media");
  if (number.length > facts.max_media) {
    note(`This server takes ${facts.max_media} items in a conversation. Start a new one.`);
    return;
  }
  waiting = [];
  $("text").value = "";
  send(parts);
};
$("text").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
};
$("text").oninput = refresh;
$("text").onpaste = (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length || !facts) return;
  event.preventDefault();
  addFiles(files);
};
$("stop").onclick = () => running?.abort();
$("new").onclick = startNew;
$("attach").onclick = () => pick(null);
$("record").onclick = record;
$("settings-button").onclick = () => {
  const isOpen = !$("settings").hidden;
  $("settings").hidden = isOpen;
  $("settings-button").setAttribute("aria-expanded", String(!isOpen));
  if (isOpen) return;
  window.scrollTo({ top: 0 });
  $("system").focus();
};

// dragenter and dragleave fire for every child element: only their balance tells whether the
// pointer is still over the page.
let inside = 0;
const hasFiles = (event) => facts && [...event.dataTransfer.types].includes("Files");
document.addEventListener("dragenter", (event) => {
  if (!hasFiles(event)) return;
  inside += 1;
  $("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!hasFiles(event)) return;
  inside -= 1;
  $("drop").hidden = inside > 0 ? false : true;
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  $("drop").hidden = true;
  if (facts) addFiles([...event.dataTransfer.files]);
});

(async () => {
  refresh();
  try {
    const response = await call("page/facts");
    if (!response.ok) throw new Refused(await sentenceOf(response));
    facts = await response.json();
    showFacts();
    refresh();
    $("text").focus();
    await showExamples();
  } catch (error) {
    note(error instanceof Refused ? error.message : "This page could not be loaded completely.");
    throw error;
  }
})();
