// Runs the program of a rater's page on a small imitation of a page: reads {html, steps} from stdin and prints what is left.
// A step is a key, "click ID", "import TEXT" or "reload".
"use strict";
const { html, steps, broken } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const inside = (id) => html.match(new RegExp(`<script[^>]* ?id="${id}">([^]*?)</script>`))[1];

class Element {
  constructor() { this.children = []; this.attributes = {}; this.text = ""; }
  set textContent(text) { this.text = String(text); this.children = []; }
  get textContent() { return this.text + this.children.map((child) => child.textContent).join("\n"); }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  setAttribute(name, value) { this.attributes[name] = value; }
  click() { if (this.download) saved.push([this.download, blobs[this.href]]); }
}

const stored = new Map(), saved = [], blobs = {};
let parts, listeners;
globalThis.localStorage = {
  getItem: (name) => { if (broken) throw new Error("none"); return stored.get(name) ?? null; },
  setItem: (name, text) => { if (broken) throw new Error("none"); stored.set(name, text); },
};
globalThis.window = { scrollTo() {} };
globalThis.Blob = class { constructor(texts) { this.whole = texts.join(""); } };
URL.createObjectURL = (blob) => { const name = `blob:${saved.length}`; blobs[name] = blob.whole; return name; };
URL.revokeObjectURL = () => {};
globalThis.setTimeout = () => {};

function load() {
  parts = { data: new Element() };
  listeners = [];
  parts.data.textContent = inside("data");
  globalThis.document = {
    getElementById: (id) => (parts[id] ??= new Element()),
    createElement: () => new Element(),
    addEventListener: (kind, listener) => listeners.push(listener),
  };
  (0, eval)(`(() => {${inside("program")}})()`);
}

(async () => {
  load();
  const shown = [];
  for (const step of steps) {
    if (step === "reload") load();
    else if (step.startsWith("click ")) parts[step.slice(6)].onclick();
    else if (step.startsWith("import ")) await parts.import.onchange({ target: { files: [{ text: async () => step.slice(7) }] } });
    else listeners.forEach((listener) => listener({ key: step }));
    const pressed = parts.scale.children.findIndex((button) => button.attributes["aria-pressed"] === "true") + 1;
    shown.push({ place: parts.place.text, rated: parts.rated.text, pressed, note: parts.note.text });
  }
  const texts = [...parts.dialogue.children, ...parts.answers.children].map((block) => block.children[1].text);
  console.log(JSON.stringify({ shown, saved, texts }));
})();
