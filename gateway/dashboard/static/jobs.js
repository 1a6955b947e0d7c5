// The pages of jobs: a job's output and events as they come, and actions on all jobs that match.
//
// The output is followed over the job's own event stream, also when it has ended (then it is
// replayed). Every text is set as textContent: prompts, errors and output stay text.
"use strict";

(() => {
  const ENDS = ["succeeded", "failed", "canceled", "expired"];

  const follow = (output) => {
    const list = document.getElementById("job-events");
    const stream = new EventSource(output.dataset.events);
    let numTokens = 0;
    let counter = null;
    const note = (text) => {
      const item = document.createElement("li");
      item.textContent = `${new Date().toLocaleTimeString("en-GB")} ${text}`;
      list.append(item);
      return item;
    };
    const on = (name, act) => stream.addEventListener(name, (event) => act(JSON.parse(event.data)));
    const clear = () => { output.textContent = ""; numTokens = 0; counter = null; };
    let isFirst = true;
    on("queued", () => note("queued"));
    on("started", (data) => {
      note(`started: attempt ${data.attempt} on ${data.worker}`);
      counter = null;
    });
    on("token", (data) => {
      if (isFirst || data.index === 0) clear();
      isFirst = false;
      output.append(data.text);
      numTokens += data.count;
      counter ??= note("");
      counter.textContent = `${numTokens} tokens`;
      output.scrollTop = output.scrollHeight;
    });
    on("reset", (data) => {
      clear();
      note(`begun again (${data.reason ?? "the token log was lost"})`);
    });
    for (const name of ENDS) {
      on(name, (data) => {
        stream.close();
        const error = data.error ? `: ${data.error.code}: ${data.error.detail ?? ""}` : "";
        note(`${name}${error}`);
        output.dataset.ended = name;
        if (document.querySelector("#job-state [data-state=queued], #job-state [data-state=running]")) {
          headrace.refresh();
        }
      });
    }
  };

  const bulk = (panel) => {
    const find = (name) => document.getElementById(`bulk-${name}`);
    const [action, priority, count, run, result] =
      ["action", "priority", "count", "run", "result"].map(find);
    let expect = null;
    const forget = () => {
      expect = null;
      run.hidden = true;
      result.textContent = "";
      find("priority-box").hidden = action.value !== "priority";
    };
    const send = async (more) => {
      const body = { action: action.value, filter: JSON.parse(panel.dataset.filter), ...more };
      if (body.action === "priority") body.priority = priority.value;
      const answer = await headrace.send("POST", "/v1/admin/jobs/bulk", body);
      if (!answer.ok) headrace.toast(answer.data.detail ?? `Refused (${answer.status}).`, true);
      return answer;
    };
    action.addEventListener("change", forget);
    priority.addEventListener("change", forget);
    count.addEventListener("click", async () => {
      forget();
      const answer = await send({ dry_run: true });
      if (!answer.ok) return;
      expect = answer.data.num_matched;
      result.textContent = `${expect} ${expect === 1 ? "job matches" : "jobs match"}.`;
      run.textContent = `${action.selectedOptions[0].textContent}: ${expect}`;
      run.hidden = expect === 0;
    });
    run.addEventListener("click", async () => {
      const question = `${run.textContent} jobs? This cannot be taken back.`;
      if (!(await headrace.ask(question, { yes: run.textContent, typed: String(expect) }))) return;
      run.disabled = true;
      const answer = await send({ expect });
      run.disabled = false;
      forget();
      if (!answer.ok) return;
      const { num_done: done, num_refused: refused, stopped } = answer.data;
      result.textContent = `${done} done, ${refused} refused.${stopped ? ` Stopped: ${stopped}` : ""}`;
      headrace.refresh();
    });
    forget();
  };

  document.addEventListener("DOMContentLoaded", () => {
    const output = document.getElementById("job-output");
    if (output) follow(output);
    const panel = document.getElementById("bulk");
    if (panel) bulk(panel);
  });
})();
