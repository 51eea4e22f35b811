// The playground: prompts of this server side by side. No build step, no dependency, and nothing that a
// model or a user wrote is ever read as markup: all of it goes through textContent.
"use strict";

const YOURS = "your text"; // the base under a system message of the visitor
const FIRST_QUESTION = "How do I keep bread fresh?";
const DEFAULT_TEXT = "Answer in one short, complete sentence.";
const state = { details: new Map(), columns: [], front: 0, turn: 0, running: new Set(), rewards: true };
const $ = (id) => document.getElementById(id);

function element(kind, className, text) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (text !== undefined && text !== null) made.textContent = String(text);
  return made;
}

// What the browser keeps. Storage may be forbidden: the page works without it.
function stored(where, name, value) {
  try {
    const store = window[where];
    if (value === undefined) return store.getItem(`rlprompt.${name}`);
    if (value === null || value === "") store.removeItem(`rlprompt.${name}`);
    else store.setItem(`rlprompt.${name}`, value);
  } catch (error) { /* private mode */ }
  return value === undefined ? null : value;
}

function headers() {
  const key = $("key").value.trim();
  return key ? { "Content-Type": "application/json", Authorization: `Bearer ${key}` } : { "Content-Type": "application/json" };
}

// The sentence of an answer that is an error, in OpenAI's shape or any other.
async function sentence(response) {
  let said = "";
  try {
    const body = await response.json();
    said = body?.error?.message ?? body?.detail ?? body?.message ?? (typeof body?.error === "string" ? body.error : "");
  } catch (error) { /* not JSON */ }
  if (response.status === 401 || response.status === 403) said = said || "the server asks for a key: put it into Settings";
  const wait = response.headers.get("retry-after");
  return `${said || response.statusText || "no answer"} (${response.status}${wait ? `, try again in ${wait} s` : ""})`;
}

async function getJson(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw Object.assign(new Error(await sentence(response)), { status: response.status });
  return response.json();
}

function say(text) {
  $("notice").textContent = text || "";
  $("notice").hidden = !text;
}

// Models and what is known of them

function shortName(id) {
  const at = id.indexOf("@");
  return at < 0 ? id : id.slice(at + 1);
}

// What is known of a model's prompts: one, or several that share its requests, or none.
function detailsOf(model) {
  return model.isYours ? [] : state.details.get(model.name) || [];
}

async function load() {
  say("");
  stop();
  let listed;
  try {
    listed = (await getJson("v1/models")).data;
  } catch (error) {
    say(`The list of prompts cannot be read: ${error.message}`);
    return;
  }
  try {
    const prompts = (await getJson("admin/prompts")).prompts || [];
    state.details = new Map();
    for (const each of prompts) {
      for (const name of new Set([each.name, ...aliases(each)])) state.details.set(name, [...(state.details.get(name) || []), each]);
    }
  } catch (error) {
    state.details = new Map(); // the key may chat and not administer: the page does without
  }
  const models = ordered(listed.map((each) => each.id).filter((id) => typeof id === "string"));
  const asked = stored("localStorage", "shown");
  const wanted = asked === null ? firstShown(models) : asked.split("\n");
  state.columns = models.map((model) => column(model));
  state.columns.forEach((each) => { each.on = wanted.includes(each.model.id); });
  if (!state.columns.some((each) => each.on) && state.columns[0]) state.columns[0].on = true;
  state.front = Math.max(0, state.columns.findIndex((each) => each.on));
  $("columns").replaceChildren(...state.columns.map((each) => each.root));
  if (!models.length) say("This server has no prompts.");
  arrange();
}

// The base, the visitor's text, then written prompts, then learned ones.
function ordered(ids) {
  const models = ids.map((id) => ({ id, name: id.includes("@") ? shortName(id) : id, send: id, isYours: false }));
  const bases = models.filter((each) => !each.id.includes("@"));
  const yours = bases.length ? [{ id: YOURS, name: YOURS, send: bases[0].id, isYours: true }] : [];
  const prompts = models.filter((each) => each.id.includes("@"));
  return [...bases, ...yours, ...prompts.filter(isText), ...prompts.filter((each) => !isText(each))];
}

const isText = (model) => detailsOf(model).some((each) => each.kind === "text");

// What a visitor sees who has chosen nothing: base, written, learned.
function firstShown(models) {
  const written = models.find(isText) || models.find((each) => each.isYours);
  const learned = models.find((each) => each.id.includes("@") && !isText(each));
  return [models[0], written, learned].filter(Boolean).map((each) => each.id);
}

function aliases(prompt) {
  const given = prompt.aliases;
  if (Array.isArray(given)) return given.map(String);
  return given && typeof given === "object" ? Object.keys(given) : [];
}

function column(model) {
  const root = element("section", "column");
  root.dataset.model = model.id;
  root.setAttribute("aria-label", model.name);
  const head = element("div", "column-head");
  head.append(element("h2", "", model.name));
  const known = detailsOf(model);
  head.append(element("span", "tag", model.isYours ? "system message" : known[0]?.kind ?? (model.id.includes("@") ? "prompt" : "no prompt")));
  if (known.length && known.every((each) => claims(each.certificate).length)) head.append(element("span", "tag good", "certified"));
  const hash = element("span", "hash");
  if (known.length === 1 && known[0].hash) hash.textContent = String(known[0].hash).slice(0, 8);
  const about = element("button", "about", "i");
  about.type = "button";
  about.title = "Verdict, certificate, history";
  about.setAttribute("aria-label", `About ${model.name}`);
  about.addEventListener("click", () => describe(model));
  head.append(hash, about);
  const log = element("div", "log");
  log.tabIndex = 0;
  root.append(head, log);
  const made = { model, root, log, hash, messages: [], answers: [], talk: 0, on: false, abort: null };
  greet(made);
  return made;
}

function greet(each) {
  const box = element("div", "empty");
  const kinds = each.model.isYours ? ["Your text", "The base under the system message of Settings."]
    : each.model.id.includes("@") ? [each.model.name, "The same model under a learned or written prompt."]
      : [each.model.name, "The model as it is, without a system prompt."];
  box.append(element("b", "", kinds[0]), document.createTextNode(kinds[1]));
  each.log.replaceChildren(box);
}

// Which columns are shown: a chip each, with its number

function arrange() {
  const chips = state.columns.map((each, index) => {
    const chip = element("button", index === state.front ? "chip front" : "chip");
    chip.type = "button";
    chip.setAttribute("aria-pressed", String(each.on));
    chip.append(element("b", "", index < 9 ? index + 1 : "·"), document.createTextNode(each.model.name));
    chip.addEventListener("click", () => choose(index));
    each.root.hidden = !each.on;
    each.root.classList.toggle("front", index === state.front);
    return chip;
  });
  const row = $("chips");
  const front = chips[state.front];
  row.replaceChildren(...chips);
  if (isNarrow() && front) row.scrollLeft = front.offsetLeft - row.offsetLeft - (row.clientWidth - front.offsetWidth) / 2;
  buttons();
}

const isNarrow = () => window.matchMedia("(max-width: 760px)").matches;

// On a wide page a chip shows and hides its column. On a narrow one it brings the column to the front, where
// a second tap takes it out of the comparison.
function choose(index) {
  const each = state.columns[index];
  if (!each) return;
  if (isNarrow() && index !== state.front) {
    each.on = true;
    state.front = index;
  } else if (!each.on) {
    each.on = true;
    state.front = index;
  } else if (state.columns.filter((other) => other.on).length > 1) {
    each.on = false;
    each.abort?.abort();
    if (state.front === index) state.front = state.columns.findIndex((other) => other.on);
  }
  stored("localStorage", "shown", state.columns.filter((other) => other.on).map((other) => other.model.id).join("\n"));
  arrange();
}

// Asking

function buttons() {
  const busy = state.running.size > 0;
  const shown = state.columns.filter((each) => each.on).length;
  $("stop").hidden = !busy;
  $("send").disabled = busy || !shown || !$("question").value.trim();
  $("question").placeholder = shown === 1 ? "Ask it" : shown === 2 ? "Ask both" : `Ask all ${shown || ""}`.trim();
  $("status").textContent = busy ? `${state.running.size} answering` : "";
}

function number(id, least, most) {
  const text = $(id).value.trim();
  const value = Number(text);
  if (text === "" || !Number.isFinite(value)) return undefined;
  return Math.min(most, Math.max(least, value));
}

function send() {
  const text = $("question").value.trim();
  const shown = state.columns.filter((each) => each.on);
  if (!text || state.running.size || !shown.length) return;
  say("");
  state.turn += 1;
  $("question").value = "";
  grow();
  for (const each of shown) ask(each, text, state.turn);
  buttons();
}

function request(each, messages) {
  const system = each.model.isYours ? $("written").value.trim() : "";
  const body = {
    model: each.model.send,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  const settings = { temperature: number("temperature", 0, 2), max_tokens: number("max_tokens", 1, 100000), seed: number("seed", 0, 2 ** 31 - 1) };
  for (const [name, value] of Object.entries(settings)) if (value !== undefined) body[name] = name === "temperature" ? value : Math.round(value);
  return body;
}

async function ask(each, text, turn) {
  if (!each.messages.length) each.log.replaceChildren();
  const messages = [...each.messages, { role: "user", content: text }];
  const view = answerView(each, text);
  const abort = new AbortController();
  each.abort = abort;
  state.running.add(each);
  const answer = { turn, text: "", tokens: 0, began: performance.now(), first: null, view, rewards: null };
  each.answers.push(answer);
  const talk = each.talk;
  let complete = false;
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(request(each, messages)), signal: abort.signal });
    if (!response.ok) throw new Error(await sentence(response));
    const hash = response.headers.get("x-rlprompt-prompt");
    if (hash) showHash(each, answer, hash);
    await read(response, (part) => receive(each, answer, part));
    complete = true;
  } catch (error) {
    if (error.name === "AbortError") view.note = "stopped";
    else view.root.append(element("div", "failed", error.message || "the connection broke"));
  }
  view.root.classList.remove("live");
  each.abort = null;
  state.running.delete(each);
  facts(answer);
  buttons();
  if (talk !== each.talk) return; // forgotten in the meantime
  if (answer.text) each.messages = [...messages, { role: "assistant", content: answer.text }];
  if (complete && answer.text) await reward(each, answer, messages);
}

function answerView(each, text) {
  const mine = element("div", "mine", text);
  const root = element("div", "answer live");
  const body = element("div", "answer-text");
  const rewards = element("div", "rewards");
  const line = element("div", "facts");
  root.append(body, rewards, line);
  each.log.append(mine, root);
  each.log.scrollTop = each.log.scrollHeight;
  return { root, body, rewards, line, note: "" };
}

function showHash(each, answer, hash) {
  answer.hash = hash;
  const short = hash.slice(0, 8);
  if (each.hash.textContent && each.hash.textContent !== short) answer.view.note = "the prompt was changed";
  each.hash.textContent = short;
  each.hash.title = hash;
}

// Server-sent events: `data:` lines up to an empty one; a chunk may end anywhere.
async function read(response, onPart) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let ended = false;
  while (!ended) {
    const { done, value } = await reader.read();
    rest += done ? decoder.decode() + "\n\n" : decoder.decode(value, { stream: true });
    const events = rest.replace(/\r\n?/g, "\n").split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") { ended = true; break; }
      if (data) onPart(parsed(data));
    }
    if (done && !ended) throw new Error("the answer broke off");
  }
  reader.cancel().catch(() => {});
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch (error) {
    throw new Error("the server sent something that is no answer");
  }
}

function receive(each, answer, part) {
  if (part.error) throw new Error(part.error.message || String(part.error));
  if (part.usage) answer.tokens = part.usage.completion_tokens ?? answer.tokens;
  const choice = part.choices?.[0];
  const text = choice?.delta?.content;
  if (text) {
    answer.first ??= performance.now();
    answer.text += text;
    const log = each.log;
    const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    answer.view.body.textContent = answer.text;
    if (follow) log.scrollTop = log.scrollHeight;
  }
  if (choice?.finish_reason === "length") answer.view.note = "cut at the longest answer";
}

function facts(answer) {
  const ended = performance.now();
  const parts = [];
  if (answer.tokens) parts.push(`${answer.tokens} tokens`);
  if (answer.first) parts.push(`${((answer.first - answer.began) / 1000).toFixed(2)} s to the first`);
  if (answer.tokens > 1 && answer.first && ended > answer.first) parts.push(`${Math.round((1000 * (answer.tokens - 1)) / (ended - answer.first))} per second`);
  if (answer.view.note) parts.push(answer.view.note);
  answer.view.line.replaceChildren(element("span", "", parts.join(" · ")));
  if (!answer.text || !navigator.clipboard) return;
  const copy = element("button", "copy", "copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(answer.text);
      copy.textContent = "copied";
    } catch (error) {
      copy.textContent = "not allowed";
    }
  });
  answer.view.line.append(copy);
}

// Rewards of an answer; the best of a turn is marked, per reward

async function reward(each, answer, messages) {
  if (!state.rewards) return;
  const response = await fetch("v1/rewards", { method: "POST", headers: headers(), body: JSON.stringify({ messages, completion: answer.text }) }).catch(() => null);
  if (!response) return;
  if ([404, 405, 501].includes(response.status)) { state.rewards = false; return; }
  if (!response.ok) {
    answer.view.rewards.replaceChildren(element("span", "reward", `no rewards: ${await sentence(response)}`));
    return;
  }
  answer.rewards = (await response.json().catch(() => ({}))).rewards || {};
  mark(answer.turn);
}

function mark(turn) {
  const peers = state.columns.flatMap((each) => each.answers.filter((answer) => answer.turn === turn && answer.rewards));
  for (const answer of peers) {
    const chips = Object.entries(answer.rewards).map(([name, value]) => {
      const isNumber = typeof value === "number";
      const others = peers.map((peer) => peer.rewards[name]).filter((other) => typeof other === "number");
      const best = isNumber && others.length > 1 && value === Math.max(...others) && value > Math.min(...others);
      const chip = element("span", best ? "reward best" : "reward", `${name} `);
      chip.append(element("b", "", isNumber ? round(value) : "–"));
      if (best) chip.title = "the best of this turn";
      return chip;
    });
    answer.view.rewards.replaceChildren(...chips);
  }
}

const round = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(3));

function stop() {
  for (const each of state.running) each.abort?.abort();
}

function reset() {
  stop();
  for (const each of state.columns) {
    each.talk += 1;
    each.messages = [];
    each.answers = [];
    greet(each);
  }
  say("");
  $("question").focus();
}

// What is known of a prompt

function claims(certificate) {
  const list = Array.isArray(certificate) ? certificate : certificate ? [certificate] : [];
  return list.map((each) => (typeof each === "string" ? each : each?.statement ?? each?.sentence)).filter(Boolean);
}

function describe(model) {
  const known = detailsOf(model);
  $("sheet-title").textContent = model.name;
  const body = [];
  if (model.isYours) body.push(element("p", "", `The model ${model.send} under this system message:`), element("p", "claim", $("written").value || "(none)"));
  else if (!known.length) body.push(element("p", "quiet", model.id.includes("@") ? "Nothing is known of this prompt here: that needs a key with the scope admin." : "The model as it is. Others are compared with it."));
  else body.push(...known.flatMap(report));
  $("sheet-body").replaceChildren(...body);
  $("sheet").showModal();
}

function report(known) {
  const verdict = typeof known.verdict === "string" ? known.verdict : known.verdict?.sentence;
  const stated = claims(known.certificate);
  const body = [element("h3", "", "Verdict"), element("p", verdict ? "claim" : "claim none", verdict || "No run has compared it yet.")];
  body.push(element("h3", "", "Certificate"));
  if (stated.length) body.push(...stated.map((text) => element("p", "claim", text)));
  else body.push(element("p", "claim none", "None: nothing is promised of it."));
  const pairs = element("dl", "pairs");
  const share = typeof known.share === "number" && known.share !== 1 ? `${Math.round(100 * known.share)}% of its requests` : null;
  const rows = { kind: known.kind, hash: known.hash, aliases: aliases(known).join(", "), share, source: known.source };
  for (const [name, value] of Object.entries(rows)) if (value) pairs.append(element("dt", "", name), element("dd", name === "hash" ? "code" : "", value));
  body.push(element("h3", "", "Prompt"), pairs, element("h3", "", "History"));
  const history = Array.isArray(known.history) ? known.history : [];
  const list = element("ul", "history");
  for (const change of [...history].reverse()) list.append(event(change));
  body.push(history.length ? list : element("p", "quiet", "No change is recorded."));
  return body;
}

function event(change) {
  const item = element("li");
  if (typeof change === "string") {
    item.textContent = change;
    return item;
  }
  const before = change.before ?? change.from;
  const to = targets(change.to);
  const did = [change.is_rollback ? "rolled back" : "", change.forced ? "forced" : ""].filter(Boolean);
  const moved = before === undefined ? `loaded ${to.slice(0, 12)}` : `${targets(before)} → ${to}`;
  const what = `${change.alias ? `${change.alias}: ` : ""}${moved}${did.length ? ` (${did.join(", ")})` : ""}`;
  item.append(element("time", "", [moment(change.at ?? change.when), change.by ?? change.who].filter(Boolean).join(" · ")), document.createTextNode(what));
  if (change.why) item.append(element("div", "quiet", change.why));
  return item;
}

// A time of the registry, to the minute.
const moment = (text) => (typeof text === "string" ? text.replace(/^(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*(Z|\+00:00)$/, "$1 $2 UTC") : text);

// What an alias points to: one version, or several with their shares of the requests.
function targets(value) {
  if (Array.isArray(value)) return value.map(targets).join(", ") || "nothing";
  if (value === null || value === undefined) return "nothing";
  if (typeof value !== "object") return String(value);
  const share = typeof value.share === "number" && value.share !== 1 ? ` (${Math.round(100 * value.share)}%)` : "";
  return `version ${value.version ?? "?"}${share}`;
}

function keys() {
  $("sheet-title").textContent = "Keys";
  const pairs = element("dl", "pairs");
  const rows = [["Ctrl Enter", "send to all that are shown (⌘ Enter on a Mac)"], ["Esc", "stop the answers, or close a sheet"], ["1 to 9", "show or hide a prompt; with Alt while typing"], ["0", "show all"], ["/", "type"], ["?", "this list"]];
  for (const [key, does] of rows) {
    const cell = element("dt");
    cell.append(element("kbd", "", key));
    pairs.append(cell, element("dd", "", does));
  }
  $("sheet-body").replaceChildren(element("h3", "", "Everywhere"), pairs);
  $("sheet").showModal();
}

function onKey(event) {
  if (event.isComposing) return;
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (state.running.size) { event.preventDefault(); stop(); }
    return;
  }
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); return; }
  const typing = event.target instanceof HTMLElement && event.target.matches("input, textarea");
  const digit = /^Digit[0-9]$/.test(event.code) ? Number(event.code.slice(5)) : /^[0-9]$/.test(event.key) ? Number(event.key) : null;
  if (event.ctrlKey || event.metaKey || (typing && !event.altKey)) return;
  if (digit !== null) {
    event.preventDefault();
    if (digit > 0) choose(digit - 1);
    else { for (const each of state.columns) each.on = true; arrange(); }
  } else if (event.key === "?") { event.preventDefault(); keys(); } else if (event.key === "/") { event.preventDefault(); $("question").focus(); }
}

function theme(turn) {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  let wanted = stored("localStorage", "theme");
  if (turn) {
    const now = root.dataset.theme || (dark ? "dark" : "light");
    wanted = stored("localStorage", "theme", now === "dark" ? "light" : "dark");
  }
  if (wanted === "dark" || wanted === "light") root.dataset.theme = wanted;
}

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function start() {
  theme(false);
  $("key").value = stored("sessionStorage", "key") || "";
  $("written").value = stored("localStorage", "written") || DEFAULT_TEXT;
  $("question").value = FIRST_QUESTION;
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("question").addEventListener("input", () => { grow(); buttons(); });
  $("stop").addEventListener("click", stop);
  $("reset").addEventListener("click", reset);
  $("settings").addEventListener("click", () => $("options").showModal());
  $("theme").addEventListener("click", () => theme(true));
  $("help").addEventListener("click", keys);
  $("key").addEventListener("change", () => { stored("sessionStorage", "key", $("key").value.trim()); state.rewards = true; load(); });
  $("written").addEventListener("change", () => stored("localStorage", "written", $("written").value));
  for (const sheet of document.querySelectorAll("dialog")) sheet.addEventListener("click", (event) => { if (event.target === sheet) sheet.close(); });
  document.addEventListener("keydown", onKey);
  load().then(() => { grow(); buttons(); });
}

start();
