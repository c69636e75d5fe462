// What a drawing is asked for, apart from the page that shows it: as a request, as a link, as curl and as Python.
"use strict";

const TEXTS = ["prompt", "negative", "size", "left", "right"];
const NUMBERS = ["seed", "steps", "guidance", "count", "best"];

// The body of POST /v1/images/generations for one model; what is left empty is the service's to choose.
function bodyOf(settings, model) {
  const body = { prompt: settings.prompt, model, seed: settings.seed ?? 0 };
  if (settings.negative) body.negative_prompt = settings.negative;
  if (settings.size) body.size = settings.size;
  if (settings.steps != null) body.num_inference_steps = settings.steps;
  if (settings.guidance != null) body.guidance_scale = settings.guidance;
  if ((settings.count ?? 1) > 1) body.n = settings.count;
  if (settings.best != null) body.best_of = settings.best;
  return body;
}

function toHash(settings) {
  const values = new URLSearchParams();
  for (const name of [...TEXTS, ...NUMBERS]) {
    if (settings[name] != null && settings[name] !== "") values.set(name, settings[name]);
  }
  for (const [name, weight] of Object.entries(settings.mix ?? {})) values.set(`mix.${name}`, weight);
  return `#${values}`;
}

// Returns only what the link says; numbers that are none are left out.
function fromHash(hash) {
  const settings = { mix: {} };
  for (const [name, value] of new URLSearchParams(hash.replace(/^#/, ""))) {
    const number = value.trim() === "" ? NaN : Number(value);
    if (TEXTS.includes(name)) settings[name] = value;
    else if (!Number.isFinite(number)) continue;
    else if (NUMBERS.includes(name)) settings[name] = number;
    else if (name.startsWith("mix.")) settings.mix[name.slice(4)] = number;
  }
  return settings;
}

function asCurl(origin, body, withKey) {
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $SELMA_API_KEY"` : "";
  return `curl ${origin}/v1/images/generations \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${quoted}'`;
}

function asPython(origin, body, withKey) {
  const plain = ["prompt", "n", "size", ...(typeof body.model === "string" ? ["model"] : [])];
  const own = Object.fromEntries(Object.entries(body).filter(([name]) => !plain.includes(name)));
  // JSON of texts, numbers and objects of numbers is Python too.
  const given = plain.filter((name) => name in body).map((name) => `    ${name}=${JSON.stringify(body[name])},\n`);
  const key = withKey ? 'os.environ["SELMA_API_KEY"]' : '"none"';
  return (
    `import base64\n${withKey ? "import os\n" : ""}\nfrom openai import OpenAI\n\n` +
    `client = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}, api_key=${key})\n` +
    `answer = client.images.generate(\n${given.join("")}    extra_body=${JSON.stringify(own)},\n)\n` +
    `open("image.png", "wb").write(base64.b64decode(answer.data[0].b64_json))\n`
  );
}

function fileName(prompt, model, seed) {
  const words = `${prompt} ${model} ${seed}`.normalize("NFKD").replace(/[^A-Za-z0-9]+/g, "-");
  return `${words.replace(/^-|-$/g, "").slice(-80)}.png`;
}

if (typeof module !== "undefined") module.exports = { bodyOf, toHash, fromHash, asCurl, asPython, fileName };
