"use strict";
(() => {
  const report = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const narrow = () => window.innerWidth < 560;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // One colour for each delta type on the whole page, of Okabe and Ito's palette, and one mark for each method of a type.
  const COLOURS = {
    light: ["#0b6fb0", "#c65102", "#00835f", "#a4477c", "#8a6d00", "#3a92c4", "#7a4fb5", "#5b6b2d", "#b23a48", "#4a6275"],
    dark: ["#6db7ec", "#f0914f", "#4fc79e", "#e09cc4", "#e3c54a", "#9ad3f5", "#b79be8", "#b3c77a", "#ee8d98", "#a3b7c7"],
  };
  const MARKS = ["circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down"];
  const types = [...new Set(report.boards.flatMap((board) => board.methods.map((method) => method.delta_type)))].sort();
  const colour = (type) => COLOURS[dark.matches ? "dark" : "light"][types.indexOf(type) % COLOURS.light.length];
  const mark = (board, place) => {
    const same = board.methods.filter((method) => method.delta_type === board.methods[place].delta_type);
    return MARKS[same.indexOf(board.methods[place]) % MARKS.length];
  };
  const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const number = (value) =>
    value === null || value === undefined ? "–" : Math.abs(value) < 10 ? (Math.round(value * 1000) / 1000 + 0).toFixed(3) : Math.abs(value) < 1000 ? value.toFixed(2)
      : Math.round(value).toLocaleString("en");
  const COSTS = {
    "trainable parameters": { of: (m) => m.trainable, log: true, unit: "trainable parameters" },
    "peak memory": { of: (m) => m.memory && m.memory / 2 ** 20, log: false, unit: "peak memory in MiB" },
    "training seconds": { of: (m) => m.seconds, log: false, unit: "seconds of training" },
    "file size": { of: (m) => m.size / 1024, log: true, unit: "file of the delta in KiB" },
  };

  // --- filters -------------------------------------------------------------------------------------------------------------
  const field = (name) => document.getElementById(name);
  const shown = new Set();
  const key = (b, m) => `${b}/${m}`;

  function filter() {
    const [task, backbone, type, text] = ["task", "backbone", "type", "text"].map((name) => field(name).value.trim().toLowerCase());
    const best = field("best").checked;
    shown.clear();
    let total = 0;
    report.boards.forEach((board, b) => {
      const here = (!task || board.task.toLowerCase() === task) && (!backbone || board.backbone.toLowerCase() === backbone);
      board.methods.forEach((method, m) => {
        total += 1;
        const fits = (!type || method.delta_type.toLowerCase() === type) && (!text || method.label.toLowerCase().includes(text));
        if (here && fits && (!best || method.best)) shown.add(key(b, m));
      });
    });
    for (const row of all(".leaderboard tbody tr")) row.hidden = !shown.has(row.dataset.method);
    for (const section of all(".board")) {
      const b = Number(section.dataset.board);
      section.hidden = !report.boards[b].methods.some((_, m) => shown.has(key(b, m)));
      pairs(section);
      draw(section);
    }
    overview();
    field("count").textContent = `${shown.size} of ${total} methods`;
    field("nothing").hidden = shown.size > 0;
  }

  function pairs(section) {
    const b = section.dataset.board;
    const against = section.querySelector(".against")?.value ?? "";
    for (const row of all(".pairs tbody tr", section)) {
      const { first, second } = row.dataset;
      row.hidden = !shown.has(key(b, first)) || !shown.has(key(b, second)) || (against !== "" && ![first, second].includes(against));
    }
  }

  function overview() {
    const table = document.querySelector(".heat");
    if (!table) return;
    const labels = new Set([...shown].map((one) => one.split("/")).map(([b, m]) => report.boards[b].methods[m].label));
    for (const row of all("tbody tr", table)) row.hidden = !labels.has(row.dataset.label);
    report.boards.forEach((board, b) => {
      const empty = !board.methods.some((_, m) => shown.has(key(b, m)));
      for (const row of all("tr", table)) row.cells[b + 1].hidden = empty;
    });
  }

  // --- sorting -------------------------------------------------------------------------------------------------------------
  function sort(header) {
    const table = header.closest("table");
    const place = header.cellIndex;
    const numeric = header.classList.contains("number");
    const before = header.getAttribute("aria-sort");
    // Numbers begin with the largest, names with the first.
    const up = before === "none" ? !numeric : before === "descending";
    const value = (row) => {
      const cell = row.cells[place];
      return numeric ? ("value" in cell.dataset ? Number(cell.dataset.value) : null) : cell.textContent.trim().toLowerCase();
    };
    const rows = all("tbody tr", table).map((row, number) => ({ row, number, value: value(row) }));
    rows.sort((a, b) => {
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null) || a.number - b.number;
      const order = a.value < b.value ? -1 : a.value > b.value ? 1 : 0;
      return (up ? order : -order) || a.number - b.number;
    });
    table.tBodies[0].append(...rows.map(({ row }) => row));
    for (const other of all("th[aria-sort]", table)) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
  }

  // --- charts --------------------------------------------------------------------------------------------------------------
  const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false };
  const seen = new Set();

  function layout(extra) {
    const axis = { gridcolor: token("--grid"), linecolor: token("--line"), zeroline: false, automargin: true, ticks: "", title: { standoff: 8 } };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest", dragmode: narrow() ? false : "zoom",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: token("--soft") },
      hoverlabel: { bgcolor: token("--card"), bordercolor: token("--line"), font: { color: token("--ink") } },
      margin: { l: 44, r: 14, t: 22, b: 44 }, showlegend: false, ...extra,
      xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
    };
  }

  /** The lines of what others are measured by: none, or else the backbone before training, and full. */
  function baselines(board, along) {
    const lines = board.methods.filter((method) => method.baseline).map((method) => [method.delta_type, method.mean]);
    const before = board.methods.find((method) => method.before !== null)?.before;
    if (!lines.some(([name]) => name === "none") && before !== undefined) lines.push(["before training", before]);
    const unique = [...new Map(lines.map(([name, value]) => [`${name} ${number(value)}`, [name, value]])).values()];
    const across = along === "x" ? "y" : "x";
    return {
      shapes: unique.map(([, value]) => ({
        type: "line", [`${along}0`]: value, [`${along}1`]: value, [`${across}0`]: 0, [`${across}1`]: 1, [`${across}ref`]: "paper", layer: "below",
        line: { color: token("--soft"), width: 1, dash: "dot" },
      })),
      annotations: unique.map(([name, value]) => ({
        text: name, showarrow: false, font: { size: 11, color: token("--soft") },
        ...(along === "x" ? { x: value, yref: "paper", y: 1, yanchor: "bottom", xanchor: "center" }
          : { y: value, xref: "paper", x: 1, xanchor: "right", yanchor: "bottom" }),
      })),
    };
  }

  const short = (label) => { const most = narrow() ? 17 : 34; return label.length > most ? `${label.slice(0, most - 1)}…` : label; };

  function scores(board, methods) {
    const from = [...methods].reverse();
    const rows = from.map(({ method }) => method);
    const points = rows.flatMap((method, y) => method.runs.map((run) => ({ method, y, run: report.runs[run], place: run })));
    return {
      data: [
        {
          type: "scatter", mode: "markers", x: points.map(({ run }) => run.score), y: points.map(({ y }) => y),
          marker: { size: 8, color: points.map(({ method }) => colour(method.delta_type)), opacity: 0.45 },
          customdata: points.map(({ place }) => `run/${place}`), text: points.map(({ method, run }) => `${method.label}<br>seed ${run.seed}: ${number(run.score)}`),
          hovertemplate: "%{text}<extra></extra>",
        },
        {
          type: "scatter", mode: "markers", x: rows.map((method) => method.mean), y: rows.map((_, y) => y),
          marker: { symbol: "line-ns", size: 15, line: { width: 2.5, color: rows.map((method) => colour(method.delta_type)) } },
          customdata: from.map(({ id }) => `method/${id}`),
          error_x: {
            type: "data", symmetric: false, thickness: 1.5, width: 4, color: token("--soft"),
            array: rows.map((method) => (method.high === null ? 0 : method.high - method.mean)),
            arrayminus: rows.map((method) => (method.low === null ? 0 : method.mean - method.low)),
          },
          text: rows.map((method) => `${method.label}<br>mean ${number(method.mean)}${method.low === null ? ", one seed" : `, ${number(method.low)} to ${number(method.high)}`}`),
          hovertemplate: "%{text}<extra></extra>",
        },
      ],
      layout: layout({
        height: 100 + 30 * Math.max(4, rows.length),
        xaxis: { title: { text: `${board.metric} on ${board.split}`, standoff: 8 } },
        yaxis: { tickvals: rows.map((_, y) => y), ticktext: rows.map((method) => short(method.label)), range: [-0.6, rows.length - 0.4], showgrid: false },
        ...baselines(board, "x"),
      }),
    };
  }

  function pareto(board, methods, name) {
    const cost = COSTS[name];
    const fits = ({ method }) => { const price = cost.of(method); return price !== null && (!cost.log || price > 0); };
    const points = methods.filter(fits);
    const prices = points.map(({ method }) => cost.of(method));
    const [least, most] = [Math.min(...prices), Math.max(...prices)];
    const share = (price) => (cost.log ? Math.log(price / least) / Math.log(most / least) : price / most);
    const front = board.methods.map((method) => ({ method })).filter((one) => fits(one) && one.method.fronts.includes(name))
      .sort((a, b) => cost.of(a.method) - cost.of(b.method));
    return {
      data: [
        {
          type: "scatter", mode: "lines", x: front.map(({ method }) => cost.of(method)), y: front.map(({ method }) => method.mean),
          line: { shape: "hv", color: token("--soft"), width: 1.5 }, hoverinfo: "skip",
        },
        {
          type: "scatter", mode: "markers+text", x: points.map(({ method }) => cost.of(method)), y: points.map(({ method }) => method.mean),
          marker: {
            size: 11, symbol: points.map(({ m }) => mark(board, m)), color: points.map(({ method }) => colour(method.delta_type)),
            line: { width: 1.5, color: token("--card") },
          },
          // Named on the chart: what is on the front; the rest by pointing at it.
          text: points.map(({ method }) => (method.baseline || !method.fronts.includes(name) ? "" : narrow() ? method.delta_type : short(method.label))),
          // Nothing is above and to the left of a front, but the edge of the chart is.
          textposition: prices.map((price) => (share(price) > 0.25 ? "top left" : "top right")),
          textfont: { size: 11, color: token("--soft") }, cliponaxis: false,
          hovertext: points.map(({ method }) => `${method.label}<br>${number(method.mean)} for ${cost.of(method).toLocaleString("en", { maximumFractionDigits: 1 })}`),
          hovertemplate: "%{hovertext}<extra></extra>", customdata: points.map(({ id }) => `method/${id}`),
        },
      ],
      layout: layout({
        height: Math.min(480, 100 + 30 * Math.max(6, board.methods.length)),
        xaxis: { title: { text: cost.unit, standoff: 8 }, type: cost.log ? "log" : "linear", ...(!cost.log ? { rangemode: "tozero" } : most > 50 * least ? { dtick: 1 } : {}) },
        yaxis: { title: { text: board.metric, standoff: 8 } },
        ...baselines(board, "y"),
      }),
    };
  }

  function curves(board, methods, name) {
    const named = new Set();
    const data = methods.flatMap(({ method, m }) => method.runs.filter((run) => report.runs[run].curves[name]).map((run) => {
      const points = report.runs[run].curves[name];
      const first = !named.has(m);
      named.add(m);
      return {
        type: "scatter", mode: points.length > 1 ? "lines" : "markers", x: points.map(([step]) => step), y: points.map(([, value]) => value),
        line: { color: colour(method.delta_type), width: 1.6, dash: ["solid", "dash", "dot", "dashdot"][MARKS.indexOf(mark(board, m)) % 4] },
        opacity: 0.8, name: short(method.label), legendgroup: String(m), showlegend: first, customdata: points.map(() => `run/${run}`),
        hovertemplate: `${method.label}, seed ${report.runs[run].seed}<br>step %{x}: %{y:.4g}<extra></extra>`,
      };
    }));
    return {
      data,
      layout: layout({
        height: narrow() ? 320 + 20 * named.size : 360, showlegend: true, legend: { orientation: "h", y: narrow() ? -0.3 : -0.2, yanchor: "top", x: 0, font: { size: 12 } },
        xaxis: { title: { text: "step", standoff: 6 } }, yaxis: { title: { text: name, standoff: 8 } },
      }),
    };
  }

  function draw(section) {
    if (section.hidden || !seen.has(section)) return;
    const b = Number(section.dataset.board);
    const board = report.boards[b];
    const methods = board.methods.map((method, m) => ({ method, m, id: key(b, m) })).filter(({ id }) => shown.has(id));
    for (const chart of all(".chart", section)) {
      const kind = chart.dataset.chart;
      const chosen = section.querySelector(kind === "pareto" ? ".cost" : ".curve").value;
      const { data, layout: given } = { scores, pareto, curves }[kind](board, methods, chosen);
      const fresh = !chart.data;
      Plotly.react(chart, data, given, CONFIG);
      if (fresh) chart.on("plotly_click", ({ points }) => points[0].customdata && go(points[0].customdata));
    }
  }

  // --- details -------------------------------------------------------------------------------------------------------------
  const pane = field("pane");

  function element(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  function facts(pairs) {
    return element("dl", {}, ...pairs.filter(([, value]) => value !== null && value !== undefined && value !== "").flatMap(([name, value, kind]) => [
      element("dt", { textContent: name }), element("dd", { textContent: value, className: kind ?? "" }),
    ]));
  }

  function code(title, text) {
    if (!text) return element("div");
    const copy = element("button", { type: "button", className: "copy", textContent: "copy" });
    copy.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText(text); copy.textContent = "copied"; } catch { copy.textContent = "select and copy"; }
    });
    return element("div", {}, element("div", { className: "with-copy" }, element("h3", { textContent: title }), copy), element("pre", {}, element("code", { textContent: text })));
  }

  const mebibytes = (bytes) => (bytes === null ? "–" : `${(bytes / 2 ** 20).toLocaleString("en", { maximumFractionDigits: 1 })} MiB`);

  function runPane(place) {
    const run = report.runs[place];
    const metrics = Object.entries(run.metrics).map(([when, values]) =>
      [{ after: `on ${run.split}`, before: "before training", validation: "on validation" }[when] ?? when,
        Object.entries(values).map(([name, value]) => `${name} ${number(value)}`).join(", ")]);
    const config = Object.entries(run.config).map(([name, value]) => `${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join("\n");
    return [run.name, [
      facts([
        ...metrics, ["task", run.task], ["backbone", run.backbone], ["delta type", run.delta_type], ["seed", run.seed],
        ["trainable parameters", run.trainable.toLocaleString("en")], ["steps", run.steps], ["training", `${run.seconds.toFixed(1)} s`],
        ["peak memory", mebibytes(run.memory)], ["file of the delta", `${run.size.toLocaleString("en")} bytes`],
        ["sha256 of the delta", run.digest, "digest"], ["sha256 of the backbone", run.base_sha256, "digest"],
        ["fingerprint of the data", run.data_fingerprint, "digest"], ["folder", run.path, "digest"],
      ]),
      run.command ? code("Run it again", run.command) : element("p", { className: "note", textContent: "Nothing beside this run says which overrides it was made with; its config is below." }),
      code("Load it", run.loading_code),
      element("details", {}, element("summary", { textContent: "Config" }), code("", config)),
      element("details", {}, element("summary", { textContent: "Versions" }), facts(Object.entries(run.versions))),
    ]];
  }

  function methodPane(id) {
    const [b, m] = id.split("/").map(Number);
    const board = report.boards[b];
    const method = board.methods[m];
    const head = ["run", "seed", board.split, "validation", "training s", "memory", "sha256 of the delta"];
    const rows = method.runs.map((place) => {
      const run = report.runs[place];
      const link = element("a", { href: `#run/${place}`, textContent: run.name });
      const cells = [run.seed, number(run.score), number(run.validation), run.seconds.toFixed(1), mebibytes(run.memory), run.digest.slice(0, 12)];
      return element("tr", {}, element("th", { scope: "row" }, link), ...cells.map((text) => element("td", { textContent: text, className: "number" })));
    });
    const table = element("table", {},
      element("thead", {}, element("tr", {}, ...head.map((text, n) => element("th", { scope: "col", textContent: text, className: n ? "number" : "" })))),
      element("tbody", {}, ...rows));
    const scroll = element("div", { className: "scroll", tabIndex: 0 }, table);
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Runs of this method");
    const p = method.pscp;
    return [`${method.label} on ${board.task}`, [
      facts([
        ["mean", `${number(method.mean)} ${board.metric} on ${board.split}`], ["standard deviation", number(method.sd)],
        ["95 % interval", method.low === null ? "one seed has none" : `${number(method.low)} to ${number(method.high)}`],
        ["on the front against", method.fronts.join(", ") || "nothing"],
        ...Object.entries(method.keys).map(([name, value]) => [name, JSON.stringify(value)]),
        ["PSCP", p && `${p.value.toFixed(2)} = ${p.score.toFixed(2)} × ${p.parameters.toPrecision(5)} (parameters) × ${p.inference.toPrecision(5)} (inference) × ${p.memory.toPrecision(5)} (memory)`],
      ]),
      element("h3", { textContent: "Runs" }), scroll,
    ]];
  }

  function go(where) { window.location.hash = where; }

  function follow() {
    const [, kind, rest] = window.location.hash.match(/^#(run|method)\/(.+)$/) ?? [];
    if (!kind) { if (pane.open) pane.close(); return; }
    const known = kind === "run" ? report.runs[rest] : report.boards[rest.split("/")[0]]?.methods[rest.split("/")[1]];
    if (!known) return;
    const [title, parts] = kind === "run" ? runPane(Number(rest)) : methodPane(rest);
    field("pane-title").textContent = title;
    field("pane-body").replaceChildren(...parts);
    if (!pane.open) pane.showModal();
    pane.scrollTop = 0;
  }

  pane.addEventListener("close", () => history.replaceState(null, "", window.location.pathname + window.location.search));
  pane.addEventListener("click", (event) => { if (event.target === pane) pane.close(); });
  field("close").addEventListener("click", () => pane.close());
  window.addEventListener("hashchange", follow);

  document.addEventListener("click", (event) => {
    const sorter = event.target.closest("button.sort");
    if (sorter) { sort(sorter.closest("th")); return; }
    const opener = event.target.closest("a[data-run], button[data-method]");
    if (opener && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      go(opener.dataset.run !== undefined ? `run/${opener.dataset.run}` : `method/${opener.dataset.method}`);
    }
  });

  // --- beginning -----------------------------------------------------------------------------------------------------------
  if (report.boards.length) {
    for (const section of all(".board")) {
      const board = report.boards[section.dataset.board];
      const names = [...new Set(board.methods.flatMap((method) => method.runs.flatMap((run) => Object.keys(report.runs[run].curves))))];
      const own = `validation ${board.metric}`;
      names.sort((a, b) => (b === own) - (a === own) || (a < b ? -1 : 1));
      section.querySelector(".curve").replaceChildren(...names.map((name) => element("option", { textContent: name })));
      section.querySelector(".curves").hidden = !names.length;
      for (const select of all(".cost, .curve", section)) select.addEventListener("change", () => draw(section));
      section.querySelector(".against")?.addEventListener("change", () => pairs(section));
    }
    const paint = () => {
      for (const dot of all(".leaderboard tbody tr")) {
        const [b, m] = dot.dataset.method.split("/");
        dot.querySelector(".swatch").style.background = colour(report.boards[b].methods[m].delta_type);
      }
      for (const section of all(".board")) draw(section);
    };
    for (const name of ["task", "backbone", "type", "best"]) field(name).addEventListener("change", filter);
    field("text").addEventListener("input", filter);
    const observer = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (isIntersecting && !seen.has(target)) { seen.add(target); draw(target); }
      }
    }, { rootMargin: "400px" });
    filter();
    for (const section of all(".board")) observer.observe(section);
    paint();
    dark.addEventListener("change", paint);
    let width = narrow();
    window.addEventListener("resize", () => { if (width !== narrow()) { width = narrow(); paint(); } });
  }
  follow();
})();
