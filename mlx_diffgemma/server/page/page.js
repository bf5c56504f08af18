// The page: asks this server for drafts, and shows each canvas as it settles. Everything said is a text node.

const MARK = "<fill>";
const NOISE = "·:∙;~+*-=^°'";
const CLASSES = [0.01, 0.1, 0.5, 1.5]; // nats: below the first a position is settled, above the last it is noise
const SHORTEST = 66; // ms a step is shown at least: 15 frames a second
const SCENE = 260; // ms a step of the opening scene
const FIRST = 450; // ms that the noise stays before the first step of a show that is to be followed
const DRAINED = 260; // ms until the last glow is gone and the text stands alone

// What the built-in model knows, as mlx_diffgemma.generate shows it: JSON.
const BUILT_IN = [
  {"name": "6×6 Sudoku", "seed": 8, "prompt": "Solve this Sudoku:\n1.. ...\n... .65\n..5 2..\n2.. 4.6\n6.. ...\n.2. .14"},
  {"name": "sort names", "seed": 1, "prompt": "Sort these names:\nNora, Ben, Zoe, Ivo, Ada, Kim"},
  {"name": "records to JSON", "seed": 1, "prompt": "Write this as JSON:\nname: Vera\njob: pilot\ncity: Oslo\n\nname: Finn\njob: cook\ncity: Rome"},
  {"name": "JSON to a table", "seed": 1, "prompt": "Make a Markdown table:\n{\"name\": \"Leo\", \"pet\": \"owl\", \"age\": 71}\n{\"name\": \"Finn\", \"pet\": \"goat\", \"age\": 38}\n{\"name\": \"Mia\", \"pet\": \"fox\", \"age\": 64}"},
  {"name": "fill in a template", "seed": 1, "prompt": "Fill in the template:\nDear {name}, your {item} will be ready on {day}.\nname: Ada, Leo\nitem: lamp\nday: Friday"}
];
const ANY = [
  { name: "why the sky is blue", prompt: "Why is the sky blue? Answer in three sentences." },
  { name: "a sonnet", prompt: "Write a sonnet about noise that turns into words." },
  { name: "a function", prompt: "Write a Python function that merges overlapping intervals." },
  { name: "a table", prompt: "Make a Markdown table of the planets: name, diameter in km, number of moons." },
];

const $ = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

/** An element: its properties, its class and attributes, and what is in it. */
function el(name, { attributes = {}, ...properties } = {}, ...inside) {
  const made = Object.assign(document.createElement(name), properties);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inside);
  return made;
}

const draw = () => Math.floor(Math.random() * 1e6); // a seed that can be typed
const quiet = (label, act, more = {}) => el("button", { type: "button", className: "quiet", onclick: act, ...more }, label);

// ------------------------------------------------------------------------------------------------------ the wire

/** The chunks of a streamed answer. Errors: Error with the server's own words. */
async function* chunks(body, key, signal) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const reply = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!reply.ok) throw new Error((await reply.json().catch(() => null))?.error?.message ?? `HTTP ${reply.status}`);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off.");
    const lines = (waiting + value).split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // a comment that keeps the line open
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

/** What a chunk says, as things to be shown one after the other. */
function* told(chunk) {
  const choice = chunk.choices?.[0];
  if (chunk.type === "diffusion_frame") yield { kind: "frame", frame: { ...chunk.diffusion, ...place(chunk) } };
  if (choice?.delta?.reasoning_content) yield { kind: "thought", text: choice.delta.reasoning_content };
  if (choice?.delta?.content) yield { kind: "said", text: choice.delta.content };
  if (choice?.finish_reason) yield { kind: "ended", reason: choice.finish_reason, report: chunk.diffusion ?? {} };
}

const place = ({ block, step, total, text }) => ({ block, step, total, text });

/** The same request for a shell. */
function curl(body, key) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [`curl -N ${location.origin}/v1/chat/completions`, `-H 'Content-Type: application/json'`];
  if (key) lines.push('-H "Authorization: Bearer $KEY"');
  return [...lines, `-d ${quoted(JSON.stringify(body))}`].join(" \\\n  ");
}

// ---------------------------------------------------------------------------------------------------- the canvas

/** Draws a canvas: a span a position. Only what differs from the frame before is touched. */
class Canvas {
  constructor(node) {
    this.node = node;
    this.before = node.appendChild(document.createTextNode("")); // what earlier canvases committed
    this.cells = [];
  }

  /** A frame after the text of earlier canvases; `last` is the frame before it, `pins` the literal runs of the text. */
  draw(before, frame, last, pins) {
    if (this.before.data !== before) this.before.data = before;
    this.length = frame.tokens.length;
    const end = ending(frame);
    const pinned = pins ? within(pins, frame, end) : [];
    const known = last?.block === frame.block ? last.tokens : frame.tokens;
    frame.tokens.forEach(([id, piece, entropy], i) => {
      if (i >= end) return this.put(i, "·", "cell rest");
      const kind = pinned[i] ? 0 : CLASSES.filter((bound) => entropy >= bound).length;
      const changed = known[i]?.[0] !== id && kind < 4 ? " changed" : "";
      this.put(i, kind < 4 ? piece : noisy(piece, id + frame.step), `cell k${kind}${changed}${pinned[i] ? " pinned" : ""}`);
    });
  }

  /** A canvas that nobody has looked at yet; between the literal runs of `pins`, if there are any. */
  noise(before, length, pins) {
    this.before.data = before;
    let at = 0;
    const random = (count) => {
      for (let i = 0; i < count; i++, at++) {
        const piece = (Math.random() < 0.3 ? " " : "") + "x".repeat(1 + Math.random() * (model.builtIn ? 1 : 5));
        this.put(at, noisy(piece, Math.floor(Math.random() * 640)), "cell k4");
      }
    };
    if (!pins) random(length);
    pins?.forEach((run, i) => {
      if (i) random(3);
      this.put(at++, run, "cell k0 pinned");
    });
    this.length = at;
  }

  put(i, text, look) {
    while (this.cells.length > Math.max(this.length, i + 1)) this.cells.pop().remove();
    const cell = (this.cells[i] ??= this.node.appendChild(el("span")));
    if (cell.textContent !== text) cell.textContent = text;
    if (cell.className !== look) cell.className = look;
  }
}

/** Glyphs that stand for an uncertain piece, as long as it is. */
function noisy(piece, salt) {
  const shape = piece.replace(/\n/g, "") || "x";
  return [...shape].map((c, k) => (c === " " ? c : NOISE[(salt * 7 + 5 * k) % NOISE.length])).join("");
}

/** How many positions stand before the end of the turn. */
function ending({ end, tokens }) {
  return end ?? tokens.findLastIndex(([, piece]) => piece !== "") + 1;
}

/** Which positions of a frame lie inside the literal runs of its text. */
function within(pins, { tokens, text }, end) {
  const spans = [];
  let at = 0;
  pins.forEach((run, i) => {
    const start = i === pins.length - 1 && i ? text.length - run.length : text.indexOf(run, at);
    if (start >= at) spans.push([start, (at = start + run.length)]);
  });
  let from = 0;
  return tokens.slice(0, end).map(([, piece]) => {
    const to = from + piece.length;
    const inside = spans.some(([start, stop]) => start <= from && to <= stop);
    from = to;
    return inside;
  });
}

// ---------------------------------------------------------------------------------------------------- an answer

/** One answer: the canvas while it is written, the text when it stands, the steps to go back to. */
class Answer {
  constructor(request, { title = "", given = "" } = {}) {
    this.request = request; // {body, key, pins}
    this.frames = [];
    this.text = "";
    this.queue = [];
    this.wake = () => {};
    this.abort = new AbortController();
    const part = (name, className, more = {}) => el(name, { className, ...more });
    this.thoughts = el("p");
    this.thinking = el("details", { className: "thoughts", hidden: true }, el("summary", {}, "Thoughts"), this.thoughts);
    this.drawn = part("p", "canvas", { attributes: { "aria-hidden": "true" } });
    this.said = part("p", "text");
    this.paper = el("div", { className: "paper" }, this.thinking, this.drawn, this.said);
    this.bars = part("div", "bars", { attributes: { "aria-hidden": "true" } });
    this.range = el("input", { type: "range", min: 0, max: 0, step: 1, attributes: { "aria-label": "Step" } });
    this.steps = el("div", { className: "steps", hidden: true }, this.bars, this.range);
    this.note = part("span", "note");
    this.player = quiet("", () => this.replay(), { className: "quiet play", hidden: true });
    this.player.setAttribute("aria-label", "Play the steps");
    this.acts = el("span", { className: "acts" });
    this.foot = el("div", { className: "foot" }, this.player, this.note, this.acts);
    this.node = el("article", { className: "answer", attributes: { "aria-label": title || "Answer" } });
    if (title) this.node.append(el("p", { className: "title" }, title));
    if (given) this.paper.classList.add("beside"), this.paper.prepend(el("p", { className: "given text" }, given));
    this.node.append(this.paper, this.steps, this.foot);
    this.canvas = new Canvas(this.drawn);
    this.range.oninput = () => this.pause().show(Number(this.range.value));
    this.drawn.onpointerover = ({ target }) => this.inspect(target);
    this.drawn.onpointerleave = () => this.at !== undefined && this.tell(this.at);
  }

  // ------------------------------------------------------------------------------------------- while it is written

  /** Ask, and show what comes, each step for `pace` ms at least. → whether it came to its end. */
  async run({ pace, length }) {
    this.node.setAttribute("aria-busy", "true");
    this.pace = pace;
    this.began = performance.now();
    const autoregressive = this.request.body.diffusion.decoding === "autoregressive";
    if (!autoregressive && !still.matches) this.canvas.noise("", length, this.request.pins);
    this.fit(length * 2);
    this.note.textContent = "reading the prompt";
    const reading = this.read();
    const ended = await this.play(autoregressive);
    await reading;
    this.node.removeAttribute("aria-busy");
    return ended;
  }

  /** Everything that comes goes into the queue at once: a slow show must not slow the server. */
  async read() {
    try {
      for await (const chunk of chunks(this.request.body, this.request.key, this.abort.signal))
        for (const item of told(chunk)) this.push(item);
      this.push({ kind: "over" });
    } catch (error) {
      this.queue = this.abort.signal.aborted ? [] : this.queue;
      this.push(this.abort.signal.aborted ? { kind: "stopped" } : { kind: "fault", text: error.message });
    }
  }

  push(item) {
    this.queue.push(item);
    this.wake();
  }

  async next() {
    while (!this.queue.length) await new Promise((wake) => (this.wake = wake));
    return this.queue.shift();
  }

  async play(autoregressive) {
    let ended = null;
    for (;;) {
      const item = await this.next();
      if (item.kind === "frame") await this.step(item.frame);
      else if (item.kind === "thought") this.think(item.text);
      else if (item.kind === "said") await this.commit(item.text, autoregressive);
      else if (item.kind === "ended") ended = item;
      else return this.conclude(item, ended);
    }
  }

  async step(frame) {
    model.length = frame.tokens.length;
    this.frames.push({ ...frame, before: frame.channel === "content" ? this.text : "" });
    const behind = this.queue[0]?.kind === "frame" && !this.pace;
    if (still.matches || behind) return; // only commits move; a show as it comes leaves out what came meanwhile
    const last = this.frames.length - 1;
    if (!last && this.pace) await sleep(Math.max(0, FIRST - (performance.now() - this.began)));
    this.draw(last);
    this.tell(last);
    await sleep(Math.max(this.pace, SHORTEST));
  }

  async commit(text, autoregressive) {
    this.text += text;
    if (this.frames.length && !still.matches) await sleep(DRAINED);
    this.said.textContent = this.text;
    this.uncover();
    this.fit(this.text.length);
    this.node.dispatchEvent(new CustomEvent("said", { detail: text, bubbles: true }));
    if (!autoregressive) return;
    this.passes = (this.passes ?? 0) + 1;
    this.note.textContent = `pass ${this.passes} · one token each`;
    if (this.pace && !still.matches) await sleep(this.pace);
  }

  think(text) {
    this.thinking.hidden = false;
    this.thoughts.textContent += text;
  }

  conclude(item, ended) {
    this.report = ended?.report ?? {};
    this.ended = ended !== null;
    if (item.kind === "fault") this.paper.append(el("p", { className: "fault", attributes: { role: "alert" } }, item.text));
    const unsaid = this.frames.length > 0 && this.frames.at(-1).block >= 0 && !this.ended;
    if (unsaid) this.drawn.classList.add("unsaid");
    else this.uncover();
    if (!this.frames.length && !this.ended) this.drawn.replaceChildren();
    this.summary = this.ended ? summary(this.report, this.passes) : item.kind === "stopped" ? "stopped" : "failed";
    if (item.kind === "stopped" && this.frames.length)
      this.summary = `stopped at step ${this.frames.at(-1).step + 1} of ${this.frames.at(-1).total}`;
    this.note.textContent = this.summary;
    if (this.ended && !still.matches) this.node.classList.add("set");
    this.offer();
    return this.ended;
  }

  /** The text alone, without the canvas. */
  uncover() {
    this.drawn.hidden = true;
    this.said.className = "text";
  }

  /** Short answers are set larger; the paper never shrinks while it is written on. */
  fit(characters) {
    this.node.classList.toggle("short", characters < 140);
  }

  // ------------------------------------------------------------------------------------------------- going back

  /** The frame `index`, or the text when it is behind the last. */
  show(index) {
    this.at = index;
    this.range.value = index;
    const text = index >= this.frames.length;
    if (text && this.ended) this.uncover();
    else this.draw(Math.min(index, this.frames.length - 1));
    this.tell(index);
    [...this.bars.children].forEach((bar, i) => bar.classList.toggle("here", i === index));
  }

  draw(index) {
    const frame = this.frames[index];
    this.drawn.hidden = false;
    this.said.className = "text heard"; // it stays for those who listen
    this.canvas.draw(frame.before, frame, this.frames[index - 1], this.request.pins);
    const height = this.paper.offsetHeight;
    if (height > (this.tallest ?? 0)) this.paper.style.minHeight = `${(this.tallest = height)}px`;
  }

  tell(index) {
    const frame = this.frames[index];
    if (!frame) return void (this.note.textContent = this.summary ?? "");
    const sure = `${frame.accepted}/${frame.tokens.length} accepted`;
    const canvas = frame.block ? `canvas ${frame.block + 1} · ` : "";
    this.note.textContent = `${canvas}step ${frame.step + 1} · ${sure} · ${nats(frame.mean_entropy)}`;
    this.range.setAttribute("aria-valuetext", this.note.textContent);
  }

  inspect(cell) {
    const token = this.frames[Math.min(this.at ?? NaN, this.frames.length - 1)]?.tokens[this.canvas.cells.indexOf(cell)];
    if (token) this.note.textContent = `${JSON.stringify(token[1])} · ${nats(token[2])} · ${token[3] ? "" : "not "}accepted`;
  }

  async replay() {
    if (this.playing) return void this.pause();
    const run = (this.playing = Symbol());
    this.player.classList.add("playing");
    this.player.setAttribute("aria-label", "Pause");
    if ((this.at ?? 0) >= this.frames.length) this.at = 0;
    for (let i = this.at ?? 0; this.playing === run && i <= this.frames.length; i++) {
      this.show(i);
      await sleep(Math.max(this.pace, 140));
    }
    if (this.playing === run) this.pause();
  }

  pause() {
    this.playing = null;
    this.player.classList.remove("playing");
    this.player.setAttribute("aria-label", "Play the steps");
    return this;
  }

  // --------------------------------------------------------------------------------------------- what can be done

  offer() {
    this.node.tabIndex = -1;
    if (this.frames.length) {
      this.steps.hidden = this.player.hidden = false;
      this.range.max = this.frames.length - (this.ended ? 0 : 1);
      const bars = this.frames.map(() => el("i"));
      if (this.ended) bars.push(el("i", { className: "last" }));
      this.bars.replaceChildren(...bars);
      const most = Math.max(...this.frames.map(({ mean_entropy }) => mean_entropy));
      this.frames.forEach(({ mean_entropy: h }, i) => (bars[i].style.height = `${100 * Math.sqrt(h / most)}%`));
      this.at = Number(this.range.max);
      this.range.value = this.at;
      bars[this.at]?.classList.add("here");
    }
    const send = (name, detail) => () => this.node.dispatchEvent(new CustomEvent(name, { detail, bubbles: true }));
    if (this.ended && this.text) this.acts.append(quiet("Keep parts", () => this.pin()));
    if (this.ended && this.text) this.acts.append(copying("Copy", () => this.text));
    this.acts.append(copying("curl", () => curl(this.request.body, this.request.key)));
    this.acts.append(quiet("Again", send("again", { answer: this })));
  }

  /** Every position is a button: pinned, or let go of. */
  pin() {
    const pins = new Pins(this.pieces());
    this.pause();
    if (this.frames.length) this.show(this.frames.length);
    const own = [this.paper, this.foot, ...(this.frames.length ? [this.steps] : [])];
    const done = () => {
      panel.remove();
      for (const part of own) part.hidden = false;
    };
    const write = quiet("Write these anew", () => {
      const text = pins.text();
      done();
      this.node.dispatchEvent(new CustomEvent("again", { detail: { answer: this, text }, bubbles: true }));
    });
    write.disabled = true;
    write.className = "send small";
    pins.node.addEventListener("change", () => (write.disabled = pins.loose === 0));
    const every = quiet("Let go of all", () => pins.all(pins.loose === pins.buttons.length));
    pins.node.addEventListener("change", () => (every.textContent = pins.loose === pins.buttons.length ? "Pin all" : "Let go of all"));
    const hint = el("p", { className: "hint" }, "All of it is pinned. Choose what to let go of: click, drag, or arrows and Space.");
    const panel = el("div", {}, el("div", { className: "paper" }, pins.node), hint);
    panel.append(el("div", { className: "foot" }, el("span", { className: "note" }), every, quiet("Cancel", done), write));
    for (const part of own) part.hidden = true;
    this.paper.before(panel);
    pins.buttons[0]?.focus();
  }

  /** The text cut into its positions; into words where these are not known. */
  pieces() {
    const lasts = this.frames.filter(({ block }, i) => this.frames[i + 1]?.block !== block);
    const pieces = lasts.flatMap((frame) => frame.tokens.slice(0, ending(frame)).map(([, piece]) => piece));
    return pieces.join("") === this.text ? pieces : (this.text.match(/\s+|\S+/g) ?? []);
  }
}

const nats = (h) => `${h < 0.0005 ? "0" : h.toPrecision(2).replace(/e.*/, "")} nats`;

function summary({ steps, canvases, seed, timings = {} }, passes) {
  const seconds = (timings.prefill_seconds ?? 0) + (timings.denoise_seconds ?? 0);
  const work = passes ? `${passes} passes` : `${steps} steps${canvases > 1 ? ` · ${canvases} canvases` : ""}`;
  return [work, seconds && `${seconds.toFixed(seconds < 10 ? 2 : 0)} s`, seed !== undefined && `seed ${seed}`]
    .filter(Boolean)
    .join(" · ");
}

function copying(label, text) {
  const button = quiet(label, async () => {
    const copied = await navigator.clipboard.writeText(text()).then(() => true, () => false);
    button.textContent = copied ? "Copied" : "Not allowed";
    await sleep(1200);
    button.textContent = label;
  });
  return button;
}

/** Positions to be pinned or let go of. One of them is in the order of Tab; the arrows lead to the others. */
class Pins {
  constructor(pieces) {
    this.pieces = pieces.filter((piece) => piece !== "");
    this.node = el("p", { className: "text pins", attributes: { role: "toolbar", "aria-label": "Positions" } });
    this.parts = this.pieces.map((piece) => (piece.trim() ? this.button(piece) : el("span", {}, piece)));
    this.node.append(...this.parts);
    this.buttons = this.parts.filter(isPin);
    this.buttons.forEach((button, i) => (button.tabIndex = i ? -1 : 0));
    this.node.onkeydown = (event) => this.key(event);
    this.node.onpointerdown = ({ target }) => this.drag(target);
    this.node.onpointerover = ({ target }) => this.dragged !== undefined && this.set(target, this.dragged);
    addEventListener("pointerup", () => (this.dragged = undefined));
  }

  button(piece) {
    return el("span", { attributes: { role: "button", "aria-pressed": "true" } }, piece); // a <button> would not break
  }

  drag(target) {
    if (!isPin(target)) return;
    this.dragged = !pressed(target);
    this.set(target, this.dragged);
  }

  set(target, pinned) {
    if (!isPin(target)) return;
    target.setAttribute("aria-pressed", String(pinned));
    this.node.dispatchEvent(new Event("change"));
  }

  all(pinned) {
    this.buttons.forEach((button) => button.setAttribute("aria-pressed", String(pinned)));
    this.node.dispatchEvent(new Event("change"));
  }

  key(event) {
    if (event.key === " " || event.key === "Enter") return event.preventDefault(), this.set(event.target, !pressed(event.target));
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const now = this.buttons.indexOf(document.activeElement);
    const then = this.buttons[now + step];
    if (!then) return;
    this.buttons[now].tabIndex = -1;
    then.tabIndex = 0;
    then.focus();
  }

  get loose() {
    return this.buttons.filter((button) => !pressed(button)).length;
  }

  /** The text with a mark for every run that was let go of; blanks between two such positions go with them. */
  text() {
    const kept = this.parts.map((part) => !isPin(part) || pressed(part));
    const loose = (i) => i >= 0 && i < kept.length && isPin(this.parts[i]) && !kept[i];
    this.parts.forEach((part, i) => {
      if (!isPin(part) && loose(i - 1) && loose(i + 1)) kept[i] = false;
    });
    return this.pieces.map((piece, i) => (kept[i] ? piece : kept[i - 1] === false ? "" : MARK)).join("");
  }
}

const isPin = (node) => node.matches("[role=button]");
const pressed = (button) => button.getAttribute("aria-pressed") === "true";

// ------------------------------------------------------------------------------------------------- what is asked

const model = { id: "", builtIn: false, length: 256 }; // positions of its canvas: 256 until one was seen
let messages = []; // the conversation so far
let pictures = []; // {url, canvas} of the message being written
let running = []; // answers being written
let following = false; // the end of the log stays in sight until somebody scrolls away
let latest = null;
const answers = new WeakMap(); // by their elements

const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
const key = () => $("key").value;

/** The request as the page's fields have it. Errors: Error for what is missing or no JSON. */
function request(content, { seed = number("seed"), template = "" } = {}) {
  const system = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  const body = {
    model: model.id,
    messages: [...system, ...messages, { role: "user", content }],
    stream: true,
    seed: seed ?? draw(),
    max_tokens: number("tokens"),
    temperature: number("temperature"),
    reasoning_effort: $("thinking").value || undefined,
    diffusion: { drafts: "tokens", steps: number("steps"), canvas: number("canvas"), stable_answer: number("stable") },
  };
  const made = { body, key: key() };
  return template ? { ...made, ...held(body, template) } : made;
}

/** A request whose answer is a text with holes. */
function held(body, text) {
  return { body: { ...body, diffusion: { ...body.diffusion, pins: { text } } }, pins: text.split(MARK) };
}

/** What the chosen shape makes of a request. Errors: Error for what is missing or no JSON. */
function shaped({ body, key }) {
  const shape = $("shape").value;
  const lines = $("choices").value.split("\n").filter((line) => line.trim());
  if (shape === "fill") {
    if (!$("template").value.includes(MARK)) throw new Error(`The text has no hole: write ${MARK} where the model is to write.`);
    return { ...held(body, $("template").value), key };
  }
  if (shape === "choice") {
    if (!lines.length) throw new Error("There is nothing to choose from: write a choice a line.");
    body.diffusion.pins = { text: MARK, holes: [{ choices: lines }] };
  }
  if (shape === "json") {
    const schema = $("schema").value.trim() ? JSON.parse($("schema").value) : null;
    body.response_format = schema
      ? { type: "json_schema", json_schema: { name: "answer", schema } }
      : { type: "json_object" };
  }
  return { body, key };
}

/** The same weights token by token: what belongs to a canvas goes. */
function autoregressive({ body, key }) {
  const { pins } = body.diffusion;
  return { body: { ...body, diffusion: { decoding: "autoregressive", pins } }, key };
}

function typed() {
  const text = $("prompt").value.trim();
  const fill = `Fill in what is missing at every ${MARK} in this text. Answer with the whole text.\n\n${$("template").value}`;
  return text || ($("shape").value === "fill" ? fill : "");
}

function content(text) {
  if (!pictures.length) return text;
  return [...pictures.map(({ url }) => ({ type: "image_url", image_url: { url } })), { type: "text", text }];
}

/** Send a request, or the same one for both decodings, and show question and answers. */
async function ask(made, shown) {
  $("opening").hidden = true;
  $("fresh").hidden = false;
  const both = pressed($("both"));
  const written = both
    ? [
        new Answer(made, { title: "The canvas: all positions at once" }),
        new Answer(autoregressive(made), { title: "Token by token" }),
      ]
    : [new Answer(made)];
  const row = both ? el("div", { className: "pair" }) : el("div");
  row.append(...written.map((answer) => answer.node));
  $("log").append(el("div", { className: "turn" }, shown, row));
  following = true;
  follow();
  const [first] = await run(written);
  if (first) messages = [...made.body.messages.filter(({ role }) => role !== "system"), spoken(written[0])];
}

const spoken = ({ text }) => ({ role: "assistant", content: text });

async function run(written) {
  running = written;
  latest = written[0];
  for (const answer of written) answers.set(answer.node, answer);
  busy(true);
  const settings = { pace: Number($("pace").value), length: number("canvas") ?? model.length };
  const ended = await Promise.all(written.map((answer) => answer.run(settings)));
  if (running === written) busy(false);
  return ended;
}

function follow() {
  if (following) scrollTo({ top: document.documentElement.scrollHeight, behavior: still.matches ? "auto" : "smooth" });
}

function busy(now) {
  $("send").hidden = now;
  $("stop").hidden = !now;
}

function question(text, { template = "", pictures = [] } = {}) {
  const node = el("div", { className: text.includes("\n") ? "asked mono" : "asked" }, ...pictures.map((p) => p.canvas), text);
  if (template) node.append(el("pre", {}, template.replaceAll(MARK, "▁▁▁")));
  return node;
}

function submit() {
  const text = typed();
  if (!text || !$("stop").hidden) return;
  try {
    const made = shaped(request(content(text)));
    const template = $("shape").value === "fill" && $("prompt").value.trim() ? $("template").value : "";
    const shown = question(text, { template, pictures });
    pictures = [];
    hang();
    $("prompt").value = "";
    grow();
    ask(made, shown);
  } catch (error) {
    $("announce").textContent = error.message;
    complain(error.message);
  }
}

function complain(text) {
  document.querySelector(".desk .fault")?.remove();
  const fault = el("p", { className: "fault hint", attributes: { role: "alert" } }, text);
  document.querySelector(".tools").before(fault);
  setTimeout(() => fault.remove(), 6000);
}

function example({ prompt, seed }) {
  messages = [];
  ask(request(prompt, { seed }), question(prompt));
}

/** The same question with another seed; with `text`, of which only the holes are written. */
function again({ detail: { answer, text } }) {
  if (!$("stop").hidden) return;
  const { body, key, pins } = answer.request;
  const seed = number("seed") ?? draw();
  const made = text ? { ...held({ ...body, seed }, text), key } : { body: { ...body, seed }, key, pins };
  const asked = body.messages.at(-1).content;
  const words = typeof asked === "string" ? asked : asked.at(-1).text;
  ask(made, question(text ? "Keep the rest, and write this anew:" : words, { template: text }));
}

// --------------------------------------------------------------------------------------------------- pictures

/** Chosen, dropped or pasted; a model without eyes takes none. */
async function take(files) {
  if ($("attach").hidden) return;
  for (const file of [...files].filter(({ type }) => type.startsWith("image/"))) {
    const url = await new Promise((done) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.readAsDataURL(file);
    });
    const bitmap = await createImageBitmap(file).catch(() => null);
    if (!bitmap) complain(`${file.name} is no picture that this browser can read.`);
    else pictures.push({ url, name: file.name, canvas: thumbnail(bitmap, file.name) });
  }
  hang();
}

function thumbnail(bitmap, name) {
  const height = 160;
  const width = Math.max(1, Math.round((bitmap.width / bitmap.height) * height));
  const canvas = el("canvas", { width, height, attributes: { role: "img", "aria-label": name } });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
  return canvas;
}

/** The pictures of the message being written. */
function hang() {
  const figures = pictures.map((picture) => {
    const remove = () => ((pictures = pictures.filter((other) => other !== picture)), hang());
    const away = el("button", { type: "button", onclick: remove, attributes: { "aria-label": `Remove ${picture.name}` } }, "×");
    return el("figure", {}, picture.canvas, away);
  });
  $("pictures").replaceChildren(...figures);
  $("pictures").hidden = !figures.length;
}

// ----------------------------------------------------------------------------------------------------- the hands

/** Text fields as high as what is in them, where the browser does not do it. */
function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  for (const area of document.querySelectorAll(".desk textarea")) {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight}px`;
  }
}

function wire() {
  $("composer").onsubmit = (event) => (event.preventDefault(), submit());
  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), submit();
  };
  addEventListener("input", grow);
  $("stop").onclick = stop;
  $("shape").onchange = () => {
    for (const name of ["fill", "choice", "json"]) $(`shape-${name}`).hidden = $("shape").value !== name;
  };
  $("hole").onclick = () => {
    $("template").setRangeText(MARK, $("template").selectionStart, $("template").selectionEnd, "end");
    $("template").focus();
  };
  $("both").onclick = () => $("both").setAttribute("aria-pressed", String(!pressed($("both"))));
  $("more").onclick = () => {
    $("settings").hidden = !$("settings").hidden;
    $("more").setAttribute("aria-expanded", String(!$("settings").hidden));
  };
  $("picture").onchange = () => (take($("picture").files), ($("picture").value = ""));
  $("fresh").onclick = () => location.reload();
  addEventListener("again", again);
  addEventListener("said", ({ detail, target }) => {
    if (target === latest?.node) $("announce").textContent = detail;
  });
  addEventListener("keydown", keys);
  for (const by of ["wheel", "touchmove"]) addEventListener(by, () => (following = false), { passive: true });
  new ResizeObserver(follow).observe($("log"));
  addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", !$("attach").hidden);
  });
  addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    take(event.dataTransfer.files);
  });
  addEventListener("paste", ({ clipboardData }) => take(clipboardData.files));
}

function stop() {
  running.forEach((answer) => answer.abort.abort());
}

/** Escape stops; Space plays and arrows go by steps, in the answer that has the focus or else the latest. */
function keys(event) {
  if (event.key === "Escape") return stop();
  const free = event.target === document.body || event.target.matches("article, [type=range]");
  if (!free || !latest || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") return event.preventDefault(), $("prompt").focus();
  const answer = answers.get(event.target.closest("article")) ?? latest;
  if (!answer.frames.length || !$("stop").hidden) return;
  if (event.key === " ") return event.preventDefault(), answer.replay();
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by && event.target !== answer.range) {
    event.preventDefault();
    answer.pause().show(Math.min(Math.max((answer.at ?? 0) + by, 0), Number(answer.range.max)));
  }
}

/** Who is served here; asked again until somebody answers. */
async function greet() {
  for (;;) {
    const reply = await fetch("/v1/models", key() ? { headers: { Authorization: `Bearer ${key()}` } } : {}).catch(() => null);
    if (reply?.ok) return await reply.json();
    if (reply?.status === 401) {
      $("model").textContent = "this server wants its key: see Settings";
      await new Promise((given) => $("key").addEventListener("change", given, { once: true }));
    } else await sleep(1500);
  }
}

async function open() {
  wire();
  const { data: [served] } = await greet();
  Object.assign(model, { id: served.id, builtIn: served.id === "built-in" });
  if (model.builtIn) model.length = 48;
  $("model").textContent = model.builtIn ? "the built-in model" : model.id;
  $("light").classList.add("on");
  $("attach").hidden = !served.input_modalities.includes("image");
  const examples = model.builtIn ? BUILT_IN : ANY;
  const button = (task) => el("li", {}, el("button", { type: "button", onclick: () => example(task) }, task.name));
  $("examples").append(...examples.map(button));
  if (model.builtIn) await demonstrate(examples[0]);
}

/** The built-in model costs nothing: one puzzle is solved before anybody has typed. */
async function demonstrate({ prompt, seed }) {
  const given = prompt.slice(prompt.indexOf("\n") + 1);
  const answer = new Answer(request(prompt, { seed }), { title: "A Sudoku, solved as you opened this page", given });
  $("specimen").append(answer.node);
  $("specimen").hidden = false;
  answers.set(answer.node, (latest = answer));
  await answer.run({ pace: SCENE, length: model.length });
}

open();
