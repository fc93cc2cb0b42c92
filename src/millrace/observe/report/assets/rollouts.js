"use strict";
// The viewer of rollouts: one prompt of one step with its answers, each token coloured by what it was told to do.
(() => {
  const data = readData("rollout-data");
  const field = (name) => document.getElementById(`v-${name}`);
  const tip = document.getElementById("tip");
  if (!data.stages.length) {
    document.getElementById("viewer").hidden = true;
    field("answers").append(make("p", { class: "empty" }, "No rollouts have been recorded."));
    return;
  }

  const COLOURS = {
    advantage: { name: "advantage", low: "less of it", high: "more of it" },
    difference: { name: "teacher − student log-prob", low: "teacher finds it less likely", high: "teacher finds it likelier" },
    sampled: { name: "log-prob when sampled", low: "surprising", high: "expected" },
  };
  const at = (values, i) => (Array.isArray(values) ? values[i] : values);
  const valueOf = (answer, i, colour) => {
    if (colour !== "difference") return at(answer[colour], i);
    const teacher = at(answer.teacher, i), student = at(answer.sampled, i);
    return teacher === null || teacher === undefined || student === null || student === undefined ? null : teacher - student;
  };
  const isRight = (answer) => !answer.masked && answer.reward >= 1;

  const fill = (select, options) => {
    const before = select.value;
    select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
    if (options.some(([value]) => String(value) === before)) select.value = before;
  };
  const stage = () => data.stages[Number(field("stage").value)];
  const step = () => stage().steps[Number(field("step").value)];
  const groups = () => step().groups.map((group, i) => [i, group]).filter(([, group]) => !field("domain").value || group.domain === field("domain").value);

  const fillSteps = () => fill(field("step"), stage().steps.map((one, i) => [i, `${one.step}`]));
  const fillDomains = () => {
    const names = [...new Set(step().groups.map((group) => group.domain))];
    fill(field("domain"), [["", "all"], ...names.map((name) => [name, name])]);
  };
  // First comes a prompt whose answers differ in reward, where it has one: from all others nothing is learned in RL.
  const fillGroups = () => {
    fill(field("group"), groups().map(([i, group]) => {
      const asked = group.messages.at(-1)?.text.replace(/\s+/g, " ").slice(0, 80) ?? group.row;
      return [i, `${group.domain} · ${group.answers.filter(isRight).length} of ${group.answers.length} right · ${asked}`];
    }));
    const telling = groups().find(([, group]) => new Set(group.answers.map((answer) => answer.reward)).size > 1);
    if (telling) field("group").value = String(telling[0]);
  };
  const fillColours = () => {
    const answers = step().groups.flatMap((group) => group.answers);
    const names = Object.keys(COLOURS).filter((name) => answers.some((answer) => (name === "difference" ? answer.teacher && answer.sampled : answer.tokens && answer[name] !== undefined)));
    const taught = names.includes("difference") ? ["difference", ...names.filter((name) => name !== "difference")] : names;
    fill(field("colour"), taught.map((name) => [name, COLOURS[name].name]));
    field("colour").parentElement.hidden = !names.length;
  };

  // The scale spans what 98% of the shown tokens of the step have, so that one outlier does not bleach all others.
  const scaleOf = (colour) => {
    const sizes = step().groups.flatMap((group) => group.answers.flatMap((answer) => (answer.tokens ?? []).map((_, i) => Math.abs(valueOf(answer, i, colour) ?? 0))));
    sizes.sort((a, b) => a - b);
    return Math.max(sizes[Math.floor(sizes.length * 0.98)] ?? 1, 1e-3);
  };
  const paint = (value, scale, colour) => {
    if (value === null || value === undefined) return "";
    const strength = Math.round(62 * Math.min(1, Math.abs(value) / scale));
    const tone = colour === "sampled" ? "rare" : value < 0 ? "minus" : "plus";
    return strength ? `background:color-mix(in srgb, var(--${tone}-rgb) ${strength}%, transparent)` : "";
  };

  const legend = (colour, scale) => {
    if (!colour) return field("legend").replaceChildren();
    const said = COLOURS[colour], ends = colour === "sampled" ? [-scale, 0] : [-scale, scale];
    const ramp = colour === "sampled"
      ? "linear-gradient(to right, color-mix(in srgb, var(--rare-rgb) 62%, transparent), transparent)"
      : "linear-gradient(to right, color-mix(in srgb, var(--minus-rgb) 62%, transparent), transparent, color-mix(in srgb, var(--plus-rgb) 62%, transparent))";
    const dotted = colour === "sampled" ? "" : " Negative tokens are underlined with dots.";
    field("legend").replaceChildren(`${said.name}: ${said.low} ${showNumber(ends[0])}`, make("span", { class: "ramp", style: `background:${ramp}`, "aria-hidden": "true" }), `${showNumber(ends[1])} ${said.high}.${dotted}`);
  };

  const told = (answer, i) => {
    const lines = [`${JSON.stringify(answer.tokens[i])}  token ${i < answer.head ? i + 1 : answer.length - answer.tokens.length + i + 1} of ${answer.length}`];
    if (answer.turn) lines.push(answer.turn[i] ? `turn ${answer.turn[i]}` : "the environment's: no part in the loss");
    const add = (name, value) => { if (value !== null && value !== undefined) lines.push(`${name} ${value > 0 && name !== "probability" ? "+" : ""}${showNumber(value)}`); };
    add("advantage", at(answer.advantage, i));
    add("student log-prob", at(answer.sampled, i));
    add("teacher log-prob", at(answer.teacher, i));
    if (answer.teacher) add("teacher − student", valueOf(answer, i, "difference"));
    return lines.join("\n");
  };
  const showTip = (token, text) => {
    tip.textContent = text;
    tip.hidden = false;
    const frame = token.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const below = frame.bottom + 8 + size.height < innerHeight;
    tip.style.left = `${Math.max(6, Math.min(innerWidth - size.width - 6, frame.left))}px`;
    tip.style.top = `${below ? frame.bottom + 8 : frame.top - size.height - 8}px`;
  };
  const hideTip = () => { tip.hidden = true; };

  const tokenText = (text) => (text === "" ? "·" : text.replace(/\n/g, "↵\n"));
  const tokensOf = (answer, colour, scale) => {
    const body = make("pre", { tabindex: "0", role: "group", "aria-label": "Answer. Arrow keys go from token to token." });
    answer.tokens.forEach((text, i) => {
      if (i === answer.head && answer.length > answer.tokens.length) body.append(make("span", { class: "cut" }, `\n… ${(answer.length - answer.tokens.length).toLocaleString("en")} tokens left out …\n`));
      const turn = answer.turn?.[i];
      if (answer.turn && turn !== answer.turn[i - 1]) body.append(make("span", { class: "speaker" }, `${i ? "\n" : ""}${turn ? `turn ${turn}` : "environment"}\n`));
      const value = valueOf(answer, i, colour);
      const style = paint(value, scale, colour), low = colour !== "sampled" && value < -0.2 * scale;
      body.append(make("span", { class: `tok${low ? " low" : ""}${text === "" ? " tiny" : ""}${turn === 0 ? " given" : ""}`, style, "data-i": i }, tokenText(text)));
    });
    readTokens(body, answer);
    return body;
  };
  const readTokens = (body, answer) => {
    let here = -1;
    const tokens = body.querySelectorAll(".tok");
    const go = (i) => {
      tokens[here]?.classList.remove("here");
      here = Math.min(tokens.length - 1, Math.max(0, i));
      tokens[here]?.classList.add("here");
      if (tokens[here]) showTip(tokens[here], told(answer, here));
    };
    body.addEventListener("pointerover", (event) => { if (event.target.dataset.i) showTip(event.target, told(answer, Number(event.target.dataset.i))); });
    body.addEventListener("pointerleave", hideTip);
    body.addEventListener("blur", () => { tokens[here]?.classList.remove("here"); here = -1; hideTip(); });
    body.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: tokens.length - 1 };
      if (event.key === "Escape") hideTip();
      if (!(event.key in moves)) return;
      event.preventDefault();
      go(moves[event.key]);
    });
  };

  const answerCard = (answer, colour, scale) => {
    const right = isRight(answer);
    const single = Array.isArray(answer.advantage) ? [] : [make("span", {}, `advantage ${showNumber(answer.advantage)}`)];
    const said = (text) => make("span", {}, text);
    const verdict = answer.masked ? "– masked: left out of loss and baseline" : `${right ? "✓" : "✕"} reward ${showNumber(answer.reward)}`;
    const turns = answer.turns > 1 ? [said(`${answer.turns} turns`)] : [];
    const ending = answer.cut ? `ended by the limit of ${answer.cut}` : answer.finish === "length" ? "cut off at the length limit" : `finish: ${answer.finish}`;
    const line = make("div", { class: "facts-line" }, make("b", {}, verdict), said(answer.reason), ...single, ...turns, said(`${answer.length} tokens`), said(ending));
    const body = answer.tokens ? tokensOf(answer, colour, scale) : make("pre", {}, answer.text);
    const more = answer.details ? [make("details", {}, make("summary", { class: "note" }, "details of the verdict"), make("pre", { class: "details" }, answer.details))] : [];
    return make("article", { class: `answer${right ? " right" : ""}` }, line, body, ...more);
  };

  const draw = () => {
    const group = step().groups[Number(field("group").value)], colour = field("colour").value, wanted = field("verdict").value;
    hideTip();
    if (!group || !groups().length) return field("answers").replaceChildren(make("p", { class: "empty" }, "No prompt of this step is in that domain."));
    const scale = colour ? scaleOf(colour) : 1;
    legend(colour, scale);
    const messages = group.messages.map((message) => make("div", { class: "message", tabindex: "0" }, make("b", {}, message.role), make("pre", {}, message.text)));
    const answers = group.answers.filter((answer) => !wanted || isRight(answer) === (wanted === "right"));
    const about = make("p", { class: "note" }, `${group.domain}, row ${group.row}, prompt of ${group.prompt_tokens} tokens; ${answers.length} of ${group.of} answers shown.`);
    field("answers").replaceChildren(about, ...messages, ...answers.map((answer) => answerCard(answer, colour, scale)));
    if (!answers.length) field("answers").append(make("p", { class: "empty" }, `No answer shown here is ${wanted}.`));
    field("note").textContent = `This page holds ${stage().steps.length} of the ${stage().recorded} recorded steps of ${stage().name}, and a few prompts of each; all rollouts lie in the run's folder under rollouts/. ${data.note}`;
  };

  const refill = (from) => {
    if (from === "stage") fillSteps();
    if (["stage", "step"].includes(from)) { fillDomains(); fillColours(); }
    if (["stage", "step", "domain"].includes(from)) fillGroups();
    draw();
  };
  fill(field("stage"), data.stages.map((one, i) => [i, one.name]));
  field("stage").value = String(data.stages.length - 1);
  document.getElementById("viewer").addEventListener("change", (event) => refill(event.target.id.slice(2)));
  document.getElementById("viewer").addEventListener("submit", (event) => event.preventDefault());
  refill("stage");
})();
