"use strict";
// The small charts of each stage, and the comparison that lays one metric of several stages over one another.
(() => {
  const data = readData("curve-data");
  const shortName = (name) => (name.includes("/") ? name.slice(name.indexOf("/") + 1) : name);
  const drawings = [];

  const stageSection = (stage) => {
    const grid = make("div", { class: "charts" });
    stage.charts.forEach((chart) => {
      const box = make("div", { class: "chart" });
      const caption = make("figcaption", {}, make("b", {}, chart.title), make("small", {}, `${chart.meaning}. Healthy: ${chart.healthy}.`));
      grid.append(make("figure", {}, caption, box));
      const series = chart.series.map((one, index) => ({ ...one, label: shortName(one.name), index }));
      drawings.push({ box, stage: stage.name, spec: { title: `${chart.title} of ${stage.name}`, unit: chart.unit, stacked: chart.stacked, series } });
    });
    const title = make("summary", {}, `${stage.name} `, make("span", { class: "note" }, `${stage.type}, ${stage.steps} steps`));
    const section = make("details", { class: "stage", open: "" }, title, grid);
    section.addEventListener("toggle", () => { if (section.open && grid.querySelector(".chart:empty")) drawStage(stage.name); });
    return section;
  };

  const drawStage = (name) => {
    const peers = [];
    drawings.filter(({ stage }) => stage === name).forEach(({ box, spec }) => drawChart(box, spec, peers));
  };

  const place = document.getElementById("stage-curves");
  if (!data.stages.length) {
    place.append(make("p", { class: "empty" }, "No step has been recorded yet."));
    document.getElementById("compare").hidden = true;
    document.getElementById("compare-title").hidden = true;
    document.getElementById("compare-chart").hidden = true;
    return;
  }
  place.append(...data.stages.map(stageSection));
  if (data.stages.some((stage) => stage.steps > data.most_points)) {
    place.append(make("p", { class: "note" }, `Long curves are thinned out to ${data.most_points} points: of each section of steps the lowest and the highest value. Times are means of sections.`));
  }

  const byMetric = new Map();
  data.stages.forEach((stage) => stage.charts.forEach((chart) => chart.series.forEach((one) => {
    if (!byMetric.has(one.name)) byMetric.set(one.name, new Map());
    byMetric.get(one.name).set(stage.name, { ...one, unit: chart.unit });
  })));
  const chosenMetric = document.getElementById("compare-metric"), chosenStages = document.getElementById("compare-stages");
  [...byMetric.keys()].sort().forEach((name) => chosenMetric.append(make("option", { value: name }, name)));
  if (byMetric.has(data.compare.metric)) chosenMetric.value = data.compare.metric;
  data.stages.forEach((stage) => {
    const box = make("input", { type: "checkbox", value: stage.name });
    box.checked = data.compare.stages.includes(stage.name);
    chosenStages.append(make("label", {}, box, ` ${stage.name}`));
  });

  const drawComparison = () => {
    const found = byMetric.get(chosenMetric.value), boxes = [...chosenStages.querySelectorAll("input")];
    boxes.forEach((box) => { box.disabled = !found.has(box.value); });
    const series = boxes.flatMap((box, index) => (box.checked && found.has(box.value) ? [{ ...found.get(box.value), label: box.value, index }] : []));
    const target = document.getElementById("compare-chart");
    if (series.length) drawChart(target, { title: `${chosenMetric.value} by stage`, unit: series[0].unit, series });
    else target.replaceChildren(make("p", { class: "empty" }, "Choose at least one stage that has this metric."));
  };
  document.getElementById("compare").addEventListener("change", drawComparison);

  const drawAll = () => {
    drawComparison();
    drawings.forEach(({ box }) => box.replaceChildren());
    data.stages.forEach((stage) => drawStage(stage.name));
  };
  let waiting = 0, drawnWidth = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (drawnWidth !== innerWidth) { drawnWidth = innerWidth; drawAll(); } }, 120);
  });
  drawnWidth = innerWidth;
  drawAll();
})();

// Measurements inside stages are rows of the matrix that are folded away at first.
document.getElementById("show-inside")?.addEventListener("change", (event) => {
  document.querySelectorAll("tr.inside").forEach((row) => {
    row.dataset.folded ??= String(row.hidden);
    row.hidden = row.dataset.folded === "true" && !event.target.checked;
  });
});
