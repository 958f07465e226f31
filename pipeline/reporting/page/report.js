(() => {
  "use strict";
  let page = JSON.parse(document.getElementById("drawn").textContent);
  const several = page.runs.length > 1;
  const find = (selector, inside = document) => inside.querySelector(selector);
  const findAll = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  const state = { smoothing: 0, log: false, full: false, timed: false, zoom: null, hidden: new Set() };

  function make(tag, className = "", text = "") {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text) element.textContent = text; // never as HTML: it may come from a run
    return element;
  }

  // ---- numbers and colors

  const minus = (text) => text.replace("-", "\u2212");
  const whole = (value) => minus(Math.round(value).toLocaleString("en-US"));
  function precise(value) {
    if (value == null) return "\u2013";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-4 || size >= 1e7) return minus(value.toExponential(2));
    const digits = Number.isInteger(value) || size < 0.01 ? 1 : 4;
    return minus(value.toLocaleString("en-US", { minimumSignificantDigits: digits, maximumSignificantDigits: 4 }));
  }
  function compact(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3) return minus(value.toExponential(0));
    return minus(value.toLocaleString("en-US", { notation: "compact", maximumSignificantDigits: 3 }));
  }

  const probe = make("span");
  probe.hidden = true;
  document.body.append(probe);
  /** The color of a style variable in the present theme. */
  function color(name) {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  }
  const translucent = (rgb, alpha) => rgb.replace(/^rgb\(/, "rgba(").replace(/\)$/, `, ${alpha})`);
  const runColor = (run) => `run-${run % 12}`;
  const isDark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };

  // ---- the x-axis: steps, or time

  const UNITS = [["days", 86400, 72 * 3600], ["h", 3600, 3 * 3600], ["min", 60, 300], ["s", 1, 0]];
  const lastStepOf = (run) => Math.max(1, ...Object.values(run.curves).map(([steps]) => steps.at(-1) ?? 0));
  /** Seconds of training until each of these steps, which ascend. */
  function secondsAt({ clock: [known, seconds] }, steps) {
    let next = 0;
    return steps.map((step) => {
      while (next < known.length - 1 && known[next] < step) next += 1;
      const [from, begin] = next ? [known[next - 1], seconds[next - 1]] : [0, 0];
      return begin + ((step - from) / Math.max(1, known[next] - from)) * (seconds[next] - begin);
    });
  }
  const axis = { end: 1, unit: "", size: 1 };
  /** Steps, or the unit of time that fits the longest run. */
  function chooseAxis() {
    const timed = page.runs.filter((run) => run.clock);
    if (!state.timed) Object.assign(axis, { end: Math.max(...page.runs.map(lastStepOf)), unit: "", size: 1 });
    else {
      const seconds = Math.max(...timed.map((run) => secondsAt(run, [lastStepOf(run)])[0]));
      const [unit, size] = UNITS.find(([, , least]) => seconds >= least);
      Object.assign(axis, { end: seconds / size, unit, size });
    }
  }
  const onAxis = (run, steps) => (state.timed ? secondsAt(run, steps).map((seconds) => seconds / axis.size) : steps);
  const isOnAxis = (run) => !state.timed || run.clock;
  chooseAxis();

  // ---- curves

  const splitOf = (key) => (key.startsWith("val/") ? "validation" : "training");
  const nameOf = (chart, key) => {
    const rest = key.slice(key.indexOf("/") + 1);
    if (key.startsWith("perf/")) return key.endsWith("_min") ? "smallest" : key.endsWith("_max") ? "largest" : "main process";
    return chart.keys.filter((other) => splitOf(other) === splitOf(key)).length > 1 ? `${splitOf(key)} ${rest}` : splitOf(key);
  };
  const DASHES = { 0: [], 1: [7, 4], 2: [2, 3] };

  /** Moving average whose weight falls by `share` for each point, without a bias to the first one. */
  function smooth(values, share) {
    let sum = 0;
    let weight = 0;
    return values.map((value) => {
      sum = share * sum + (1 - share) * value;
      weight = share * weight + (1 - share);
      return sum / weight;
    });
  }

  /** The smallest and the largest value of a line in view, without those that are among its 2 % at either end. */
  function nearRange({ xs, values }) {
    const [from, to] = state.zoom ?? [0, axis.end];
    const seen = values.filter((value, place) => xs[place] >= from && xs[place] <= to).sort((a, b) => a - b);
    if (!seen.length) return [];
    const last = seen.length - 1;
    return last < 7 ? [seen[0], seen[last]] : [seen[Math.ceil(0.02 * last)], seen[Math.floor(0.98 * last)]];
  }

  /** The lines of a chart: one for each run and key. */
  function linesOf(chart) {
    return page.runs.flatMap((run, number) =>
      chart.keys.flatMap((key, place) =>
        Object.hasOwn(run.curves, key) && isOnAxis(run)
          ? [{ run: number, key, place, xs: onAxis(run, run.curves[key][0]), values: run.curves[key][1] }]
          : [],
      ),
    );
  }

  class ChartCard {
    constructor(chart, parent) {
      this.chart = chart;
      this.card = make("div", "card");
      const head = make("div", "card-head");
      const title = make("b", "", chart.title);
      if (chart.unit) title.append(make("span", "unit", chart.unit));
      this.readout = make("div", "readout");
      this.outside = make("span", "outside");
      head.append(title, this.outside, this.readout);
      this.place = make("div", "plot");
      this.card.append(head, this.place);
      parent.append(this.card);
      this.renew();
    }

    /** Smoothed values stand before the given ones, so that series 2i + 1 are smooth and 2i + 2 are as logged.
     * Validation has few values, of many images each, which are not smoothed. */
    table() {
      const tables = this.lines.flatMap(({ key, xs, values }) => [
        [xs, smooth(values, key.startsWith("val/") ? 0 : state.smoothing)],
        [xs, values],
      ]);
      return uPlot.join(tables);
    }

    colorOf(line) {
      return color(several ? runColor(line.run) : runColor(line.place));
    }

    series() {
      return this.lines.flatMap((line) => {
        const stroke = this.colorOf(line);
        const points = { show: line.xs.length < 40 && line.key.startsWith("val/"), size: 5, fill: stroke };
        const base = { spanGaps: true, show: !state.hidden.has(line.run), dash: several ? DASHES[line.place] : [] };
        const single = line.xs.length === 1;
        return [
          { ...base, stroke, width: 1.6, points: single ? { show: true, size: 6, fill: stroke } : points },
          { ...base, stroke: translucent(stroke, 0.28), width: 1, points: { show: false }, show: base.show && state.smoothing > 0 },
        ];
      });
    }

    /** The range of the y-axis for the values in view: of each line all, or all but a few that are far from the others. */
    rangeOf(smallest, largest) {
      this.outside.textContent = "";
      if (smallest == null) return [null, null];
      let [low, high] = [smallest, largest];
      if (!state.full && this.chart.has_outliers) {
        const near = this.lines.filter(({ run }) => !state.hidden.has(run)).flatMap((line) => nearRange(line));
        const [least, most] = [Math.min(...near), Math.max(...near)];
        if (most > least && least - smallest > most - least) low = least;
        if (most > least && largest - most > most - least) high = most;
      }
      const range = uPlot.rangeNum(low, high, 0.1, true);
      const beyond = [];
      if (smallest < range[0]) beyond.push(`down to ${compact(smallest)}`);
      if (largest > range[1]) beyond.push(`up to ${compact(largest)}`);
      if (beyond.length) this.outside.textContent = `outside the axis: ${beyond.join(", ")}`;
      return range;
    }

    draw() {
      this.plot?.destroy();
      this.outside.textContent = "";
      const positive = this.lines.every(({ values }) => values.every((value) => value > 0));
      const base = { stroke: color("quiet"), font: "11px system-ui, sans-serif", ticks: { show: false } };
      const grid = { stroke: color("line"), width: 1 };
      const ticks = (unit) => (u, splits) => splits.map((value) => (value == null ? null : `${compact(value)}${unit && ` ${unit}`}`));
      const options = {
        width: Math.max(200, this.place.clientWidth),
        height: 190,
        legend: { show: false },
        padding: [6, 18, 0, 0],
        scales: {
          x: { time: false, range: () => state.zoom ?? [0, axis.end] },
          y: state.log ? { distr: positive ? 3 : 4 } : { range: (u, smallest, largest) => this.rangeOf(smallest, largest) },
        },
        axes: [
          { ...base, grid: { show: false }, values: ticks(axis.unit), space: 60, size: 20, gap: 4 },
          { ...base, grid, values: ticks(""), space: 34, size: 52, gap: 6 },
        ],
        series: [{}, ...this.series()],
        cursor: {
          sync: { key: "steps", setSeries: false },
          drag: { x: true, y: false, setScale: false },
          y: false,
          points: { show: false },
          bind: { dblclick: () => () => { zoomTo(null); return null; } },
        },
        hooks: {
          setSelect: [(u) => this.selected(u)],
          setCursor: [(u) => this.read(u.cursor.idx)],
          drawAxes: [(u) => this.drawRestarts(u)],
        },
      };
      this.plot = new uPlot(options, this.table(), this.place);
      this.read(null);
    }

    selected(u) {
      const { left, width } = u.select;
      if (width > 4) zoomTo([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
      if (width) u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    }

    /** A dashed line where an attempt after the first one begins. */
    drawRestarts(u) {
      const { ctx, bbox } = u;
      ctx.save();
      ctx.beginPath();
      ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
      ctx.clip();
      ctx.setLineDash([4, 4]);
      page.runs.forEach((run, number) => {
        if (state.hidden.has(number) || !isOnAxis(run)) return;
        ctx.strokeStyle = translucent(color(several ? runColor(number) : "quiet"), 0.7);
        ctx.lineWidth = devicePixelRatio;
        for (const { step } of run.restarts) {
          const x = Math.round(u.valToPos(onAxis(run, [step])[0], "x", true));
          ctx.beginPath();
          ctx.moveTo(x, bbox.top);
          ctx.lineTo(x, bbox.top + bbox.height);
          ctx.stroke();
        }
      });
      ctx.restore();
    }

    /** Shows the values at a place of the table, or the last ones, as they were logged. */
    read(place) {
      this.readout.replaceChildren();
      const xs = this.plot?.data[0] ?? [];
      if (place != null && xs.length) this.readout.append(make("span", "", state.timed ? `${precise(xs[place])} ${axis.unit}` : `step ${whole(xs[place])}`));
      const order = this.lines.map((line, number) => number).sort((a, b) => this.lines[a].place - this.lines[b].place);
      let group = this.readout;
      let key = "";
      for (const number of order) {
        const line = this.lines[number];
        if (state.hidden.has(line.run)) continue;
        if (several && line.key !== key) {
          group = make("div", "group");
          this.readout.append(group);
          if (this.chart.keys.length > 1) group.append(make("span", "", nameOf(this.chart, line.key)));
          key = line.key;
        }
        const values = this.plot?.data[2 * number + 2] ?? [];
        let at = place ?? values.length - 1;
        while (at >= 0 && values[at] == null) at -= 1;
        const item = make("span");
        const dot = make("i", "dot");
        dot.style.background = `var(--${several ? runColor(line.run) : runColor(line.place)})`;
        item.append(dot);
        if (!several && this.chart.keys.length > 1) item.append(`${nameOf(this.chart, line.key)} `);
        item.append(make("strong", "", precise(values[at])));
        group.append(item);
      }
    }

    update() {
      this.plot.setData(this.table());
      this.read(null);
    }

    /** Takes over the numbers of a newer page, or another x-axis. */
    renew() {
      this.lines = linesOf(this.chart);
      this.draw();
    }

    resize() {
      const width = Math.max(200, this.place.clientWidth);
      if (width !== this.plot.width) this.plot.setSize({ width, height: 190 });
    }
  }

  const cards = [];
  for (const chart of page.charts) {
    const parent = findAll(".charts").find((element) => element.dataset.section === chart.section);
    cards.push(new ChartCard(chart, parent));
  }

  function zoomTo(range) {
    state.zoom = range;
    for (const card of cards) card.plot.setScale("x", { min: range?.[0] ?? 0, max: range?.[1] ?? axis.end });
    const share = range === null ? 1 : range[1] === axis.end ? 1 - range[0] / axis.end : 0;
    for (const button of findAll("[data-range]")) {
      button.setAttribute("aria-pressed", String(Math.abs(Number(button.dataset.range) - share) < 1e-9));
    }
  }

  for (const button of findAll("[data-range]")) {
    const share = Number(button.dataset.range);
    button.addEventListener("click", () => zoomTo(share === 1 ? null : [axis.end * (1 - share), axis.end]));
  }
  for (const button of findAll("[data-axis]")) {
    button.addEventListener("click", () => {
      state.timed = button.dataset.axis === "time";
      for (const other of findAll("[data-axis]")) other.setAttribute("aria-pressed", String(other === button));
      const without = page.runs.filter((run) => !isOnAxis(run)).map(({ name }) => name);
      find("#without").textContent = without.length ? `Not drawn, as it has no times: ${without.join(", ")}` : "";
      chooseAxis();
      state.zoom = null;
      for (const card of cards) card.renew();
      zoomTo(null);
    });
  }
  find("#smoothing")?.addEventListener("input", (event) => {
    const before = state.smoothing;
    state.smoothing = Number(event.target.value);
    find("output[for=smoothing]").textContent = event.target.value;
    const redraw = (before > 0) !== (state.smoothing > 0);
    for (const card of cards) redraw ? card.draw() : card.update();
  });
  for (const choice of ["log", "full"]) {
    find(`#${choice}`)?.addEventListener("change", (event) => {
      state[choice] = event.target.checked;
      for (const card of cards) card.draw();
    });
  }

  // ---- latent groups

  const RAMPS = {
    light: [[244, 246, 249], [163, 200, 232], [41, 112, 190], [10, 42, 94]],
    dark: [[27, 34, 43], [28, 78, 128], [74, 160, 222], [220, 243, 255]],
  };
  function ramp(share, stops) {
    const at = Math.min(0.9999, Math.max(0, share)) * (stops.length - 1);
    const [from, to] = [stops[Math.floor(at)], stops[Math.floor(at) + 1]];
    return `rgb(${from.map((value, i) => Math.round(value + (to[i] - value) * (at % 1))).join(",")})`;
  }

  class HeatMap {
    /** `rivals`: the maps of all runs, which share colors and steps, so that they can be compared. */
    constructor(run, title, unit, map, rivals, parent) {
      Object.assign(this, { map, unit });
      const sorted = rivals.flatMap(({ values }) => values.flat()).filter((value) => value != null).sort((a, b) => a - b);
      this.top = sorted[Math.floor(0.98 * (sorted.length - 1))] || 1;
      this.isCut = sorted.at(-1) > this.top * 1.001;
      this.last = Math.max(1, ...rivals.map(({ last }) => last));
      this.rowHeight = Math.max(11, Math.min(24, Math.floor(260 / map.rows.length)));
      const card = make("div", "card");
      card.dataset.run = run;
      const head = make("div", "card-head");
      const heading = make("b", "", several ? `${page.runs[run].name}: ${title}` : title);
      if (unit) heading.append(make("span", "unit", unit));
      this.scale = make("span", "scale");
      this.bar = make("i");
      this.scale.append("0", this.bar, `${this.isCut ? "\u2265 " : ""}${precise(this.top)}`);
      this.readout = make("div", "readout");
      head.append(heading, this.scale, this.readout);
      this.canvas = make("canvas");
      this.canvas.setAttribute("role", "img");
      this.canvas.setAttribute("aria-label", `${title}, groups by steps; the newest values are in the table below`);
      const labels = make("div", "labels");
      for (const row of map.rows) {
        const label = make("div", "", row.replace("_group", " \u00b7 "));
        label.style.cssText = `height:${this.rowHeight}px;line-height:${this.rowHeight}px;font-size:${Math.min(12, this.rowHeight - 1)}px`;
        labels.append(label);
      }
      const body = make("div", "map");
      const axis = make("div", "axis");
      for (const part of [0, 0.5, 1]) axis.append(make("span", "", compact(part * this.last)));
      body.append(labels, this.canvas, axis);
      card.append(head, body);
      parent.append(card);
      this.card = card;
      for (const kind of ["pointermove", "pointerdown"]) this.canvas.addEventListener(kind, (event) => this.read(event));
      this.canvas.addEventListener("pointerleave", () => this.readout.replaceChildren());
      this.draw();
    }

    draw() {
      const { canvas, map, rowHeight } = this;
      const stops = RAMPS[isDark() ? "dark" : "light"];
      this.bar.style.background = `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map((share) => ramp(Math.sqrt(share), stops)).join(",")})`;
      const width = Math.max(80, canvas.clientWidth || canvas.parentElement.clientWidth - 90);
      const ratio = devicePixelRatio || 1;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(rowHeight * map.rows.length * ratio);
      canvas.style.height = `${rowHeight * map.rows.length}px`;
      const ctx = canvas.getContext("2d");
      const edge = (column) => Math.round(((map.steps[column] ?? map.last) / this.last) * canvas.width);
      map.values.forEach((values, row) => {
        const top = Math.round(row * rowHeight * ratio);
        const height = Math.round((row + 1) * rowHeight * ratio) - top - Math.round(ratio);
        values.forEach((value, column) => {
          if (value == null) return;
          ctx.fillStyle = ramp(Math.sqrt(Math.max(0, value) / this.top), stops);
          ctx.fillRect(edge(column), top, Math.max(1, edge(column + 1) - edge(column)), height);
        });
      });
    }

    read(event) {
      const box = this.canvas.getBoundingClientRect();
      const row = Math.min(this.map.rows.length - 1, Math.max(0, Math.floor((event.clientY - box.top) / this.rowHeight)));
      const step = ((event.clientX - box.left) / box.width) * this.last;
      const column = step > this.map.last ? -1 : this.map.steps.findLastIndex((start) => start <= step);
      this.readout.replaceChildren();
      if (column < 0) return;
      this.readout.append(make("span", "", `${this.map.rows[row]}, from step ${whole(this.map.steps[column])}:`));
      this.readout.append(make("strong", "", precise(this.map.values[row][column])));
    }
  }

  let maps = [];
  function buildMaps() {
    find("#maps")?.replaceChildren();
    const kinds = [["kl", "KL by group", "nats"], ["active_units", "Active units by group", ""]];
    maps = page.runs.flatMap((run, number) =>
      kinds.flatMap(([kind, title, unit]) => {
        const rivals = page.runs.map(({ groups }) => groups[kind]).filter((map) => map);
        return run.groups[kind] ? [new HeatMap(number, title, unit, run.groups[kind], rivals, find("#maps"))] : [];
      }),
    );
  }
  buildMaps();

  // ---- pictures

  const gallery = find("#gallery");
  const slider = find("#step");
  /** Shows the newest step, or stays at the one that was chosen. */
  function buildGallery() {
    const chosen = slider.value === slider.max ? null : Number(slider.dataset.step);
    gallery.replaceChildren();
    const steps = [...new Set(page.runs.flatMap((run) => run.steps))].sort((a, b) => a - b);
    const frames = [];
    page.runs.forEach((run, number) => {
      if (!run.steps.length) return;
      const block = make("div");
      block.dataset.run = number;
      if (several) {
        const title = make("h3", "run-title");
        title.append(make("i", `dot run-${number}`), run.name);
        block.append(title);
      }
      const kinds = make("div", "kinds");
      for (const [kind, pictures] of Object.entries(run.pictures)) {
        const figure = make("figure", "card");
        const caption = make("figcaption");
        const stepText = make("span");
        const [folder, rest] = kind.split("/");
        caption.append(make("b", "", rest ? `${folder}, ${rest.replaceAll("_", " ")}` : folder), stepText);
        const image = make("img", run.sizes[kind][0] < 480 ? "few" : "");
        [image.width, image.height] = run.sizes[kind];
        figure.append(caption, image);
        kinds.append(figure);
        frames.push({ image, stepText, pictures, kind, name: run.name, own: Object.keys(pictures).map(Number).sort((a, b) => a - b) });
      }
      block.append(kinds);
      gallery.append(block);
    });
    slider.max = steps.length - 1;
    slider.value = chosen === null ? steps.length - 1 : Math.max(0, steps.findLastIndex((step) => step <= chosen));
    const show = () => {
      const step = steps[Number(slider.value)];
      slider.dataset.step = step;
      find("output[for=step]").textContent = whole(step);
      slider.setAttribute("aria-valuetext", `step ${step}`);
      for (const { image, stepText, pictures, kind, name, own } of frames) {
        const nearest = own.findLast((other) => other <= step) ?? own[0];
        image.src = pictures[nearest];
        image.alt = `${kind} of ${name} at step ${nearest}`;
        stepText.textContent = `step ${whole(nearest)}`;
      }
    };
    slider.oninput = show;
    show();
  }
  if (gallery) buildGallery();

  // ---- runs, theme, size

  const paintDots = () => findAll(".dot[class*=run-]").forEach((dot) => {
    dot.style.background = `var(--run-${Number(dot.className.match(/run-(\d+)/)[1]) % 12})`;
  });
  paintDots();
  for (const chip of findAll(".chip")) {
    chip.addEventListener("click", () => {
      const run = Number(chip.dataset.run);
      state.hidden.has(run) ? state.hidden.delete(run) : state.hidden.add(run);
      chip.setAttribute("aria-pressed", String(!state.hidden.has(run)));
      for (const card of cards) card.draw();
      for (const part of findAll("#maps [data-run], #gallery [data-run]")) part.hidden = state.hidden.has(Number(part.dataset.run));
    });
  }

  const themeButton = find("#theme");
  function redrawAll() {
    themeButton.textContent = isDark() ? "Light" : "Dark";
    for (const card of cards) card.draw();
    for (const map of maps) map.draw();
  }
  function keepTheme(theme) {
    try {
      localStorage.setItem("theme", theme);
    } catch {
      // a browser that stores nothing for a file: the choice holds for this view
    }
  }
  try {
    const kept = localStorage.getItem("theme");
    if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  } catch {
    // the system's theme is used
  }
  themeButton.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    keepTheme(document.documentElement.dataset.theme);
    redrawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
  redrawAll();
  new ResizeObserver(() => {
    for (const card of cards) card.resize();
    for (const map of maps) map.draw();
  }).observe(find("main"));

  // ---- news of runs that are being trained, from report.py --serve

  const RENEWED = ["#summary", "#evaluations", "#settings", "#data", "#environment", ".title .state", ".made"];
  const shapeOf = ({ charts, runs }) =>
    JSON.stringify([charts, runs.map((run) => [run.name, !!run.groups.kl, run.steps.length > 0])]);

  async function ask(address) {
    const answer = await fetch(address, { cache: "no-store" });
    const text = await answer.text();
    if (!answer.ok) throw new Error(text);
    return text;
  }

  /** Replaces what differs in a newer page; reads it anew where it has other charts. */
  function renew(fresh) {
    const drawn = JSON.parse(find("#drawn", fresh).textContent);
    if (shapeOf(drawn) !== shapeOf(page)) {
      location.reload();
      return;
    }
    for (const selector of RENEWED) {
      const [old, renewed] = [find(selector), find(selector, fresh)];
      if (!old || !renewed || old.outerHTML === renewed.outerHTML) continue;
      findAll("details", renewed).forEach((part, place) => { part.open = findAll("details", old)[place]?.open ?? false; });
      old.replaceWith(document.adoptNode(renewed));
    }
    page = drawn;
    chooseAxis();
    for (const card of cards) card.renew();
    buildMaps();
    if (gallery) buildGallery();
    paintDots();
    for (const part of findAll("#maps [data-run], #gallery [data-run]")) part.hidden = state.hidden.has(Number(part.dataset.run));
  }

  async function watch() {
    const notice = find("#watch");
    let { version } = page.refresh;
    for (;;) {
      await new Promise((done) => setTimeout(done, page.refresh.seconds * 1000));
      try {
        const newest = await ask("version");
        if (newest !== version) renew(new DOMParser().parseFromString(await ask("page"), "text/html"));
        version = newest;
        notice.textContent = "refreshed while it is open";
      } catch (error) {
        notice.textContent = `not refreshed: ${error instanceof TypeError ? "report.py no longer answers" : error.message}`;
      }
    }
  }
  if (page.refresh) watch();
  document.documentElement.dataset.ready = "true";
})();
