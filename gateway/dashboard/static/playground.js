// The playground: one job at a time, its tokens as they come, its times, and the same as a program.
//
// Times are this browser's, from the click on Run: what a user would feel. The answer is text that
// is only ever appended as text; `reset` (its log was lost) starts it anew.
"use strict";
(() => {
  const ENDINGS = ["succeeded", "failed", "canceled", "expired"];
  let job = null; // the one that runs: {id, source, startedMs, queueMs, firstMs, lastMs, numTokens}

  const by = (id) => document.getElementById(id);
  const show = (name, value, format) => {
    by(`time-${name}`).textContent = headrace.written(value, format);
  };

  const say = (state) => {
    const badge = by("status");
    badge.textContent = state;
    badge.dataset.state = state;
  };

  // What is sent: the fields of POST /v1/jobs.
  const asked = (form) => {
    const { mode, system, messages, prompt, ...body } = headrace.formData(form);
    if (mode === "raw") return { ...body, prompt: prompt ?? "" };
    const chat = [{ role: "user", content: messages ?? "" }];
    if (system) chat.unshift({ role: "system", content: system });
    return { ...body, messages: chat };
  };

  const running = (is) => {
    by("run").disabled = is;
    by("cancel").disabled = !is;
    by("output").setAttribute("aria-busy", String(is));
  };

  const showTimes = () => {
    const { startedMs, queueMs, firstMs, lastMs, firstTokens, numTokens } = job;
    show("queue", queueMs, "ms");
    show("ttft", firstMs === undefined ? undefined : firstMs - startedMs, "ms");
    show("total", (lastMs ?? performance.now()) - startedMs, "ms");
    show("tokens", numTokens, "count");
    const spentMs = lastMs - firstMs;
    if (numTokens > firstTokens && spentMs > 0) show("rate", (1000 * (numTokens - firstTokens)) / spentMs, "rate");
  };

  const take = (event) => {
    const data = JSON.parse(event.data);
    const output = by("output");
    const atEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
    const now = performance.now();
    if (event.type === "started") {
      job.queueMs ??= now - job.startedMs;
      say("running");
    } else if (event.type === "token") {
      if (job.firstMs === undefined) {
        job.firstMs = now;
        job.firstTokens = data.index + data.count;
      }
      job.lastMs = now;
      job.numTokens = data.index + data.count;
      output.append(data.text);
      if (atEnd) output.scrollTop = output.scrollHeight;
    } else if (event.type === "reset") {
      output.textContent = "";
    } else if (ENDINGS.includes(event.type)) {
      end(data);
      return;
    }
    showTimes();
  };

  const end = (data) => {
    job.source.close();
    job.lastMs = performance.now();
    if (data.usage) job.numTokens = data.usage.completion_tokens;
    showTimes();
    say(data.status);
    by("time-finish").textContent = data.finish_reason ?? data.error?.code ?? data.status;
    if (data.error?.detail) headrace.toast(data.error.detail, true);
    job = null;
    running(false);
  };

  const follow = (id) => {
    const source = new EventSource(`/v1/admin/jobs/${encodeURIComponent(id)}/events`);
    for (const name of ["queued", "started", "token", "reset", ...ENDINGS]) source.addEventListener(name, take);
    source.onerror = () => {
      if (source.readyState !== EventSource.CLOSED) return; // it connects again, and goes on where it was
      say("not followed");
      headrace.toast("The job's events cannot be read any more: open the job to see how it ends.", true);
      job = null;
      running(false);
    };
    return source;
  };

  const run = async (form) => {
    if (job) return;
    headrace.clearProblems(form);
    let body;
    try {
      body = asked(form);
    } catch (error) {
      return headrace.showProblem(form, error.message);
    }
    by("output").textContent = "";
    for (const name of ["queue", "ttft", "rate", "total", "tokens", "finish"]) show(name);
    job = { startedMs: performance.now(), numTokens: 0, source: null, wantsCancel: false };
    running(true);
    say("sent");
    const answer = await headrace.send("POST", "/v1/admin/playground", body);
    if (!answer.ok) {
      job = null;
      running(false);
      say("refused");
      return headrace.showProblem(form, answer.data.detail ?? `Refused (${answer.status}).`, (path) => fieldOf(form, path));
    }
    say("queued");
    job.id = answer.data.id;
    by("job-link").href = `/dashboard/jobs/${encodeURIComponent(job.id)}`;
    by("job-link").hidden = false;
    job.source = follow(job.id);
    if (job.wantsCancel) cancel();
  };

  // A refusal of "prompt" or "messages[0].content" belongs to the field that is shown.
  const fieldOf = (form, path) => {
    if (!/^(messages|prompt)\b/.test(path)) return path;
    return form.elements.mode.value === "chat" ? "messages" : "prompt";
  };

  const cancel = async () => {
    if (!job) return;
    if (!job.id) {
      job.wantsCancel = true; // its id is on the way
      return;
    }
    const answer = await headrace.send("POST", `/v1/admin/jobs/${encodeURIComponent(job.id)}/cancel`, {});
    if (!answer.ok && answer.status !== 409) headrace.toast(answer.data.detail ?? "Not canceled.", true);
  };

  // -- as a program: every value is quoted by the rules of the language it stands in -------------

  const shellQuoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

  const pythonOf = (value, indent = "") => {
    const inner = `${indent}    `;
    if (value === null) return "None";
    if (typeof value === "boolean") return value ? "True" : "False";
    if (typeof value !== "object") return JSON.stringify(value); // a JSON text is a Python text
    const isList = Array.isArray(value);
    const items = isList
      ? value.map((item) => pythonOf(item, inner))
      : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${pythonOf(item, inner)}`);
    const [open, close] = isList ? "[]" : "{}";
    return items.length ? `${open}\n${inner}${items.join(`,\n${inner}`)},\n${indent}${close}` : open + close;
  };

  const snippets = (body, origin) => ({
    "as-curl": `curl -sS ${origin}/v1/jobs \\
  -H "Authorization: Bearer $HEADRACE_API_KEY" \\
  -H 'Content-Type: application/json' -H 'Prefer: wait=60' \\
  -d ${shellQuoted(JSON.stringify(body))}
`,
    "as-python": `import json
import os
import urllib.request

body = ${pythonOf(body)}
request = urllib.request.Request(
    ${JSON.stringify(`${origin}/v1/jobs`)},
    data=json.dumps(body).encode(),
    headers={
        "Authorization": "Bearer " + os.environ["HEADRACE_API_KEY"],
        "Content-Type": "application/json",
        "Prefer": "wait=60",
    },
)
with urllib.request.urlopen(request) as response:
    print(json.load(response))
`,
    "as-openai": `import os

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}, api_key=os.environ["HEADRACE_API_KEY"])
body = ${pythonOf(body)}
job = client.post("/jobs", body=body, cast_to=object, options={"headers": {"Prefer": "wait=60"}})
print(job)
`,
  });

  document.addEventListener("DOMContentLoaded", () => {
    const form = by("playground");
    const update = () => {
      const isChat = form.elements.mode.value === "chat";
      by("chat-fields").hidden = !isChat;
      by("raw-fields").hidden = isChat;
      let body;
      try {
        body = asked(form);
      } catch {
        return; // said when it is run
      }
      for (const [id, text] of Object.entries(snippets(body, location.origin))) by(id).value = text;
    };
    form.addEventListener("input", update);
    form.elements.model.addEventListener("change", () => {
      const option = form.elements.model.selectedOptions[0];
      if (option?.dataset.hasChat === "no") form.elements.mode.value = "raw";
      update();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      run(form);
    });
    by("cancel").addEventListener("click", cancel);
    document.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        run(form);
      } else if (event.key === "Escape" && job && !by("confirm").open) {
        cancel();
      }
    });
    form.elements.model.dispatchEvent(new Event("change"));
  });
})();
