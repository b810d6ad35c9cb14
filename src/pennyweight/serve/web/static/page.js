// What a page does beyond HTMX: curves, answers as they are written, files let fall, texts copied.
"use strict";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Curves -----------------------------------------------------------------------------------------

const WHOLE = Array.from({ length: 8 }, (_, i) => [1, 2, 5].map((n) => n * 10 ** i)).flat(); // no half steps

function drawn(figure, data) {
  const plot = figure.querySelector(".plot");
  const axis = () => ({
    stroke: () => colour("--soft"),
    grid: { stroke: () => colour("--line"), width: 1 },
    ticks: { show: false },
    font: "12px Inter, system-ui, sans-serif",
  });
  const value = (_, v) => (v == null ? "–" : v.toPrecision(4));
  const options = {
    width: plot.clientWidth,
    height: 272,
    cursor: { y: false, points: { size: 7 } },
    scales: { x: { time: false } },
    axes: [{ ...axis(), space: 60, incrs: WHOLE, size: 30, label: "step", labelSize: 20, labelFont: "12px Inter, system-ui, sans-serif" }, { ...axis(), size: 48 }],
    legend: { markers: { width: 0, fill: (u, i) => u.series[i].stroke?.(u, i) ?? "transparent" } },
    series: [
      { label: "step", value: (_, v) => (v == null ? "–" : String(v)) },
      { label: "loss in training", stroke: () => colour("--edge"), width: 1.5, points: { show: false }, value },
      {
        label: "loss on held-out rows", stroke: () => colour("--accent"), width: 2.5, spanGaps: true,
        points: { show: true, size: 7, fill: () => colour("--accent") }, value,
      },
    ],
  };
  const chart = new uPlot(options, data, plot);
  new ResizeObserver(() => chart.setSize({ width: plot.clientWidth, height: 272 })).observe(plot);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => chart.redraw(false));
  return chart;
}

async function follow(figure) {
  let chart = null;
  for (let wait = 1500; figure.isConnected; ) {
    let found = null;
    try {
      const answer = await fetch(figure.dataset.curve, { headers: { accept: "application/json" } });
      if (answer.status === 401) return location.reload();
      if (answer.ok) found = await answer.json();
    } catch { /* the server is away for a moment: ask again, more slowly */ }
    if (found) {
      wait = 1500;
      if (found.data[0].length) {
        chart ? chart.setData(found.data) : (chart = drawn(figure, found.data));
        figure.querySelector("figcaption").textContent = found.says;
      }
      if (found.ended) return;
    } else {
      wait = Math.min(wait * 2, 30000);
    }
    await new Promise((go) => setTimeout(go, wait));
  }
}

// Answers ----------------------------------------------------------------------------------------

async function* lines(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}

async function answered(card, question, signal) {
  const text = card.querySelector("pre");
  const foot = card.querySelector(".told");
  const began = performance.now();
  let tokens = 0, first = 0;
  try {
    const answer = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...question, model: card.dataset.model, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const line of lines(answer)) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const piece = JSON.parse(line.slice(6));
      if (piece.error) throw new Error(piece.error.message);
      const said = piece.choices?.[0]?.delta?.content;
      if (said) {
        first ||= performance.now();
        text.textContent += said;
      }
      if (piece.usage) tokens = piece.usage.completion_tokens;
    }
    const seconds = (performance.now() - began) / 1000;
    const wait = first ? `, the first after ${((first - began) / 1000).toFixed(2)} s` : "";
    foot.textContent = `${tokens} tokens in ${seconds.toFixed(2)} s${wait}`;
    if (!text.textContent) text.textContent = "(nothing: the model ended its answer at once)";
  } catch (fault) {
    foot.textContent = signal.aborted ? "Stopped." : `No answer: ${fault.message}`;
  } finally {
    card.classList.remove("waiting");
  }
}

function playground(form) {
  const place = document.querySelector("#answers");
  const status = document.querySelector("#asked");
  const stop = form.querySelector("[data-stop]");
  const send = form.querySelector("[type=submit]");
  let halt = null;
  stop.addEventListener("click", () => halt?.abort());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const asked = new FormData(form);
    const models = asked.getAll("model");
    if (!models.length) {
      status.textContent = "Choose at least one model to ask.";
      return;
    }
    halt?.abort();
    halt = new AbortController();
    const system = asked.get("system").trim();
    const question = {
      messages: [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: asked.get("question") }],
      temperature: Number(asked.get("temperature")),
      max_tokens: Number(asked.get("max_tokens")),
      seed: 0,
    };
    const cards = models.map((model) => {
      const card = document.querySelector("#answer").content.firstElementChild.cloneNode(true);
      card.dataset.model = model;
      card.querySelector("h2").textContent = model;
      card.classList.add("waiting");
      return card;
    });
    place.replaceChildren(...cards);
    send.disabled = true;
    stop.hidden = false;
    status.textContent = `Asking ${models.length === 1 ? models[0] : `${models.length} models`}…`;
    await Promise.all(cards.map((card) => answered(card, question, halt.signal)));
    send.disabled = false;
    stop.hidden = true;
    status.textContent = halt.signal.aborted ? "Stopped." : "All have answered.";
  });
  form.querySelector("textarea[name=question]").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}

// Files and texts --------------------------------------------------------------------------------

function droppable(zone) {
  const input = zone.querySelector("input[type=file]");
  const over = (event) => { event.preventDefault(); zone.classList.add("over-it"); };
  zone.addEventListener("dragenter", over);
  zone.addEventListener("dragover", over);
  zone.addEventListener("dragleave", () => zone.classList.remove("over-it"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over-it");
    if (event.dataTransfer.files.length) {
      input.files = event.dataTransfer.files;
      input.dispatchEvent(new Event("change", { bubbles: true }));
    }
  });
}

function chosen(form) {
  // A file that is picked is what will be trained on, whatever was marked before.
  const own = form.querySelector("input[name=rows][value='']");
  form.querySelector("input[type=file]")?.addEventListener("change", () => { if (own) own.checked = true; });
  // What was checked no longer stands when something changes.
  form.addEventListener("change", () => document.querySelector("#checked")?.replaceChildren());
}

async function copied(button) {
  const text = button.parentElement.querySelector("code").textContent;
  await navigator.clipboard.writeText(text);
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1500);
}

// The server tells times in UTC; whoever reads them lives somewhere.
function local(time) {
  const at = new Date(time.dateTime);
  const part = time.dataset.time === "clock" ? { timeStyle: "medium" } : { dateStyle: "medium", timeStyle: "short" };
  time.title = time.textContent;
  time.textContent = new Intl.DateTimeFormat(undefined, part).format(at);
}

// The door stands at whatever was asked for; who has signed in goes on there.
function onwards(field) {
  if (location.pathname !== "/login") field.value = location.pathname + location.search;
}

function begin(root) {
  const each = (choice, act) => {
    if (root.matches?.(choice)) act(root);
    root.querySelectorAll(choice).forEach(act);
  };
  each("[data-curve]", follow);
  each("time[data-time]", local);
  each("input[name=next]", onwards);
  each("form[data-playground]", playground);
  each(".drop", droppable);
  each("form[data-new]", chosen);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest(".copy > button");
  if (button) copied(button);
});
document.addEventListener("DOMContentLoaded", () => begin(document.body));
document.addEventListener("htmx:load", (event) => { if (event.target !== document.body) begin(event.target); });
document.addEventListener("htmx:responseError", (event) => { if (event.detail.xhr.status === 401) location.reload(); });
// A refusal is an answer too: what it says takes its place on the page.
document.addEventListener("htmx:beforeSwap", (event) => {
  if (event.detail.xhr.status >= 400 && event.detail.xhr.getResponseHeader("content-type")?.startsWith("text/html")) {
    event.detail.shouldSwap = true;
    event.detail.isError = false;
  }
});
// After a check the result is read out and reached from the keyboard.
document.addEventListener("htmx:afterSettle", (event) => {
  if (event.target.id === "checked") event.target.querySelector("h2")?.focus();
});
