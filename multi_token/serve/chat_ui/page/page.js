// The chat page: what a person drops, records and types becomes requests of /v1/chat/completions.
//
// Border: no framework, and no network but this server. Whatever anybody wrote is put into the page
// as text, never as HTML.
"use strict";

const STORED_KEY = "multi_token.key";
const $ = (id) => document.getElementById(id);

let facts = null; // what /page/facts says
let turns = []; // {role, parts}: the conversation, answered turns only
let waiting = []; // media parts that go with the next message
let running = null; // AbortController of the answer that is being written
let recording = null;
let reading = 0; // files that are being read
let asking = null; // for the key, while a dialog does
let key = sessionStorage.getItem(STORED_KEY);

class Refused extends Error {}

/** An element; strings among its children become text nodes. */
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

/** fetch with the key, which is asked for as often as the server refuses it. */
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
      throw new Refused("The server does not answer. Is it still running?");
    }
    if (response.status !== 401) return response;
    if (used === key) {
      asking ||= askForKey(Boolean(used)).finally(() => (asking = null));
      await asking; // one dialog, however many requests were refused
    }
    options.signal?.throwIfAborted();
  }
}

async function askForKey(wasRefused) {
  const dialog = $("key-dialog");
  $("key-note").textContent = wasRefused
    ? "That key was refused. Try another one."
    : "It is kept until this tab is closed.";
  $("key-note").classList.toggle("refused", wasRefused);
  $("key").value = "";
  dialog.showModal();
  $("key").focus();
  key = await new Promise((resolve) => {
    dialog.oncancel = (event) => event.preventDefault();
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      // headers hold no other letters, and a key has none
      const given = $("key").value.replace(/[^\x21-\x7e]/g, "");
      if (given) resolve(given);
    };
  });
  sessionStorage.setItem(STORED_KEY, key);
  dialog.close();
}

/** What the server says went wrong, in its own sentence. */
async function sentenceOf(response) {
  let message = null;
  try {
    message = (await response.json()).error.message;
  } catch {
    message = null; // something between here and the server answered
  }
  return sentence(message || `The server answered with the status ${response.status}.`);
}

function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

/** The objects of a stream of server-sent events, up to [DONE]. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Refused("The connection ended before the answer did.");
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
    reader.cancel().catch(() => {}); // whoever stops reading frees the connection
  }
}

// ---- files

const suffixOf = (name) => (/\.[^./\\]+$/.exec(name) || [""])[0].toLowerCase();

function kindOfType(type) {
  if (type === "application/pdf") return "document";
  const [family] = type.split("/");
  return ["image", "audio", "video"].includes(family) ? family : null;
}

/** The senses that take a file, those that its type names first; a film may be a sound as well. */
function sensesFor(file) {
  const suffix = suffixOf(file.name);
  const kind = kindOfType(file.type);
  const fits = (sense) =>
    sense.takes.length === 0 ||
    sense.takes.some((t) => t.suffixes.includes(suffix) || (suffix === "" && t.kind === kind));
  const score = (sense) => Number(sense.takes.some((t) => t.kind === kind));
  return facts.senses.filter(fits).sort((a, b) => score(b) - score(a));
}

function whatItTakes() {
  const described = facts.senses.map((sense) => {
    const files = sense.takes.map((t) => `${t.noun} (${t.suffixes.join(" ")})`);
    return `${sense.name}: ${files.join(", ") || "any file"}`;
  });
  return described.length ? `It has ${described.join("; ")}.` : "It has no senses, only text.";
}

async function addFiles(files, only = null) {
  note("");
  for (const file of files) {
    const senses = only ? sensesFor(file).filter((s) => s.name === only) : sensesFor(file);
    const problem = refusal(file, senses, only);
    if (problem) {
      note(problem);
      continue;
    }
    reading += 1;
    refresh();
    try {
      waiting.push(await partOf(file, senses));
    } catch (error) {
      note(error instanceof Refused ? error.message : `“${file.name}” cannot be read.`);
    } finally {
      reading -= 1;
      refresh();
    }
  }
  $("text").focus();
}

function refusal(file, senses, only) {
  if (!senses.length) {
    const who = only ? `The sense ${only}` : "This model";
    return `${who} does not take “${file.name}”. ${whatItTakes()}`;
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

/** base64 makes four letters of three bytes, and the rest of a request needs a little. */
const mostBytes = () => Math.floor(facts.max_body_bytes * 0.74);

async function partOf(file, senses) {
  const shown = await shownAs(file, senses);
  const part = {
    kind: "media",
    name: file.name,
    modality: senses[0].name,
    senses: senses.map((sense) => sense.name),
    shown,
    size: size(file.size),
    url: shown === "file" ? null : URL.createObjectURL(file),
  };
  const takesNumbers = senses[0].takes.some((t) => t.kind === "numbers");
  if (takesNumbers && [".json", ".csv", ".txt"].includes(suffixOf(file.name))) {
    part.data = numbersOf(await file.text(), file.name);
    part.size = `${part.data.flat().length} numbers`;
  } else {
    part.data = await base64(file);
  }
  return part;
}

async function shownAs(file, senses) {
  const kinds = senses[0].takes.filter((t) => t.suffixes.includes(suffixOf(file.name)));
  const kind = kindOfType(file.type) || kinds[0]?.kind;
  if (kind === "image") return (await isPicture(file)) ? "image" : "file";
  return ["audio", "video"].includes(kind) ? kind : "file";
}

/** Whether this browser can show it; the server may read more kinds. */
async function isPicture(file) {
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

/** A list of numbers, or one such list a line, out of JSON or of a table. */
function numbersOf(text, name) {
  const wrong = new Refused(
    `“${name}” should hold numbers: a JSON list, or lines of numbers with commas between them.`,
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
    if (rows.length > 1 && rows[0].every(Number.isNaN)) rows.shift(); // names of columns
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
    note("The microphone cannot be used. Does this browser allow this page to?");
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
      const senses = facts.senses.filter((sense) => sense.takes.some((t) => t.kind === "audio"));
      const file = new File([wav], "recording.wav", { type: "audio/wav" });
      await addFiles([file], senses.length === 1 ? senses[0].name : null);
    } catch {
      note("Nothing was recorded; try again, a little longer.");
    }
  };
  recording.start();
  refresh();
}

/** Recorders write what only few programs read; WAV is read by all. One channel, 16 bits. */
async function asWav(blob) {
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

/** What a turn's parts are in a request. */
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
    ...(longest ? { max_tokens: longest } : {}), // else what the prompt leaves room for
    temperature: Number($("temperature").value) || 0,
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** Send a message, and write its answer as it comes. */
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
        `This conversation has ${size(body.length)} of media; this server takes ` +
          `${size(facts.max_body_bytes)}. Begin a new one.`,
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
    else problem = "The connection broke off before the answer was complete.";
  }
  if (!answer.isConnected) return; // a new conversation has begun
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

/** A line under an answer: how it ended, what it took. */
function remark(text, finish, usage, times, began) {
  const said = [];
  if (finish === "stopped") said.push("Stopped");
  else if (!text) said.push("An empty answer");
  else if (finish === "length") said.push("Cut off at the longest answer");
  if (usage) {
    const media = Object.entries(usage.prompt_tokens_details?.media_tokens || {});
    said.push(...media.map(([name, number]) => `${name} ${number} tokens`));
    const seconds = (times.last - times.first) / 1000;
    const number = usage.completion_tokens;
    const speed = seconds > 0.05 && number > 2 ? `, ${((number - 1) / seconds).toFixed(0)} a second` : "";
    said.push(`answer ${number} token${number === 1 ? "" : "s"}${speed}`);
  }
  if (times.first) said.push(`first after ${((times.first - began) / 1000).toFixed(2)} s`);
  return said.join(" · ");
}

/** A turn's media and text, as the conversation shows them. */
function show(turn) {
  const node = el("li", { className: `turn ${turn.role}` });
  const media = turn.parts.filter((part) => part.kind === "media");
  if (media.length) node.append(el("div", { className: "items" }, ...media.map(player)));
  const words = wordsOf(turn.parts);
  if (words.length) node.append(el("div", { className: "words" }, ...words));
  $("turns").append(node);
  return node;
}

/** Text as it reads; media stand above it, and are named only where they stand inside of it. */
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

function startAnew() {
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

/** The message as it will be sent: each item on a line of its own, then the text. */
function composed() {
  const text = $("text").value.trim();
  const lines = waiting.flatMap((part) => [part, { kind: "text", text: "\n" }]);
  if (!text) lines.pop();
  return text ? [...lines, { kind: "text", text }] : lines;
}

// ---- what is seen

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
  $("record").setAttribute("aria-label", recording ? "End the recording" : "Record sound");
  $("waiting").hidden = !waiting.length;
  $("waiting").replaceChildren(...waiting.map(itemOf));
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
  if ($("welcome").hidden) scrollDown(); // the message's own field may have grown over the answer
}

function itemOf(part) {
  const label = el("span", { className: "label" }, el("span", { title: part.name }, part.name));
  if (part.senses.length > 1) {
    const select = el("select", { "aria-label": `Sense for ${part.name}` });
    select.append(...part.senses.map((name) => el("option", { value: name }, name)));
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
  if (part.shown === "video") shown[0].controls = false; // there is no room for them
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

/** Follow the answer, unless its reader has scrolled away from it. */
function scrollDown(always = false) {
  const { scrollHeight, scrollTop, clientHeight } = document.documentElement;
  if (always || scrollHeight - scrollTop - clientHeight < 160) {
    window.scrollTo({ top: scrollHeight });
  }
}

function showFacts() {
  document.title = `${facts.name} · multi_token`;
  $("name").textContent = facts.name;
  const nouns = [...new Set(facts.senses.flatMap((s) => s.takes.map((t) => t.noun)))];
  const named = new Intl.ListFormat("en", { type: "conjunction" }).format(nouns);
  $("claim").textContent = nouns.length
    ? `A language model that also takes ${named}. Drop them anywhere on this page, and ask.`
    : "Ask it something.";
  $("senses").replaceChildren(
    ...facts.senses.map((sense) => {
      const what = sense.takes.map((t) => t.noun).join(", ") || "files";
      const button = el("button", { type: "button", title: `Attach ${what}` }, sense.name);
      button.setAttribute("aria-label", `${sense.name}: attach ${what}`);
      button.onclick = () => pick(sense);
      return el("li", {}, button);
    }),
  );
  $("attach").hidden = !facts.senses.length;
  const hears = facts.senses.some((s) => s.takes.some((t) => t.kind === "audio"));
  $("record").hidden = !hears || !navigator.mediaDevices || !window.MediaRecorder;
  $("system").value = facts.system || "";
  $("max-tokens").placeholder = facts.default_max_tokens;
  $("report").hidden = !facts.report;
  if (facts.report) $("report").href = facts.report;
}

function pick(sense) {
  const senses = sense ? [sense] : facts.senses;
  const anything = senses.some((s) => !s.takes.length);
  const suffixes = senses.flatMap((s) => s.takes.flatMap((t) => t.suffixes));
  $("files").accept = anything ? "" : [...new Set(suffixes)].join(",");
  $("files").onchange = () => {
    addFiles([...$("files").files], sense?.name);
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
      if (!(error instanceof Refused)) throw error; // one that cannot be had is left out
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
    startAnew();
    $("system").value = example.system || "";
    send(parts);
  };
  return card;
}

// ---- what people do

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const parts = composed();
  if (!parts.length || running || !facts || reading) return;
  const number = [...turns, { parts }].flatMap((t) => t.parts).filter((p) => p.kind === "media");
  if (number.length > facts.max_media) {
    note(`This server takes ${facts.max_media} items in a conversation. Begin a new one.`);
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
$("new").onclick = startAnew;
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

let inside = 0; // entered elements minus left ones, while files are dragged over the page
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
    note(error instanceof Refused ? error.message : "This page could not be loaded whole.");
    throw error;
  }
})();
