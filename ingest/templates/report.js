"use strict";
// Fills the gallery and the table of failures: only what the current page of each shows is ever created.
// Everything from the store is written with textContent, so nothing in it can become markup.
(async () => {
  const CARDS = 24, FAILURES = 50, GROUPS = 30;
  const at = (id) => document.getElementById(id);

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  async function inflate(base64) {
    const binary = atob(base64), bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
  }

  let data;
  try {
    data = JSON.parse(await inflate(at("data").textContent));
  } catch (error) {
    at("trouble").hidden = false;
    at("trouble").textContent = `The scans cannot be shown: ${error.message}. Browsers older than 2023 cannot read this page.`;
    return;
  }
  const pictures = JSON.parse(at("pictures").textContent);
  const rows = data.status.length;
  const count = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
  const fixed = (value, digits) =>
    value === null ? "–" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const statusOf = (row) => data.statuses[data.status[row]];
  const kindOf = (row) => data.kinds[data.status[row]];

  // What a search looks through, in lower case, once.
  const searched = Array.from({ length: rows }, (_, row) =>
    [data.participant[row], data.session[row], data.modality[row], data.source[row], statusOf(row),
      data.reason[row] || "", data.why[row] || ""].join("\n").toLowerCase());

  const SORTS = [
    { name: "score", title: "outlier score", values: data.score, down: true },
    ...data.measures.map((m) => ({ name: m.name, title: m.title.toLowerCase(), values: data.numbers[m.name], down: true })),
    { name: "participant", title: "participant", values: data.participant, down: false },
    { name: "row", title: "row of the store", values: data.status.map((_, row) => row), down: false },
  ];
  const collator = new Intl.Collator("en", { numeric: true });
  const orders = new Map();

  // All rows in one order; those without the value come last, whatever the direction.
  function ordered(sort, down) {
    const key = sort.name + down;
    if (!orders.has(key)) {
      const values = sort.values, sign = down ? -1 : 1;
      const known = [], unknown = [];
      for (let row = 0; row < rows; row++) (values[row] === null || values[row] === "" ? unknown : known).push(row);
      const compare = sort.name === "participant"
        ? (a, b) => collator.compare(values[a], values[b])
        : (a, b) => values[a] - values[b];
      known.sort((a, b) => sign * compare(a, b) || a - b);
      orders.set(key, known.concat(unknown));
    }
    return orders.get(key);
  }

  // Damaged and other bad scans first, then what waits, then what is expected.
  const severity = { bad: 0, waiting: 1, expected: 2 };
  const failed = Object.keys(data.reason).map(Number)
    .sort((a, b) => severity[kindOf(a)] - severity[kindOf(b)] || data.status[a] - data.status[b] || a - b);

  const state = { terms: [], status: "", outliers: false, group: null, sort: SORTS[0], down: true, page: 0, failurePage: 0 };

  function matches(row) {
    if (state.status && statusOf(row) !== state.status) return false;
    if (state.outliers && !(row in data.why)) return false;
    if (state.group !== null && data.group[row] !== state.group) return false;
    return state.terms.every((term) => searched[row].includes(term));
  }

  function field(title, value, flagged, hint) {
    const line = make("div");
    line.append(make("dt", "", title), make("dd", flagged ? "flag" : "", value));
    line.title = hint;
    return line;
  }

  function pictureOf(row) {
    const box = make("div", row in pictures ? "picture" : "picture absent");
    if (row in pictures) {
      const image = make("img");
      image.src = "data:image/webp;base64," + pictures[row];
      image.alt = `axial, coronal and sagittal plane of row ${row}`;
      box.append(image);
      for (const letter of data.letters) {
        const span = make("span", "", letter.text);
        span.style[letter.edge] = letter.percent + "%";
        span.setAttribute("aria-hidden", "true");
        box.append(span);
      }
    } else if (data.score[row] !== null) {
      const text = make("p", "", "Picture not embedded. To see it: ");
      text.append(make("code", "", `--rows ${row}`));
      box.append(text);
    } else {
      box.append(make("p", "", "No volume"));
    }
    return box;
  }

  function nameOf(row) {
    if (statusOf(row) === "withdrawn") return "withdrawn";
    const session = data.session[row] ? ` · session ${data.session[row]}` : "";
    return `${data.participant[row]}${session}`;
  }

  function card(row) {
    const outlier = row in data.why;
    const element = make("article", outlier ? "card outlier" : "card");
    element.dataset.row = row;
    const body = make("div", "body"), head = make("div", "head");
    head.append(make("h3", "text", nameOf(row)));
    if (kindOf(row) !== "good") head.append(make("span", `pill ${kindOf(row)}`, statusOf(row)));
    else head.append(make("span", outlier ? "pill outlier" : "pill expected", `${fixed(data.score[row], 1)} SDs`));
    body.append(head);
    if (outlier) body.append(make("p", "why", data.why[row]));
    if (data.reason[row]) body.append(make("p", "reason text", data.reason[row]));
    if (data.score[row] !== null) {
      const numbers = make("dl");
      for (const m of data.measures) {
        const unit = m.unit === "grey levels" ? "" : ` ${m.unit}`;
        const flagged = outlier && data.flags[row].includes(m.name);
        numbers.append(field(m.title, fixed(data.numbers[m.name][row], m.decimals) + unit, flagged, `${m.unit}: ${m.meaning}`));
      }
      const [x, y, z] = ["x", "y", "z"].map((axis) => fixed(data.numbers[axis][row], 1));
      numbers.append(field("From the grid's centre", `${x}, ${y}, ${z} mm`, false, "centre of mass: x to the right, y forward, z up"));
      body.append(numbers);
    }
    const where = [data.modality[row], data.source[row]].filter(Boolean).join(" · ");
    body.append(make("p", "source text", `row ${row}${where ? ` · ${where}` : ""}`));
    element.append(pictureOf(row), body);
    return element;
  }

  function failureRow(row) {
    const line = make("tr"), status = make("td");
    line.dataset.row = row;
    status.append(make("span", `pill ${kindOf(row)}`, statusOf(row)));
    line.append(make("td", "number", String(row)), status, make("td", "text", data.participant[row]),
      make("td", "text", data.session[row]), make("td", "text", data.source[row]), make("td", "text", data.reason[row]));
    return line;
  }

  // Buttons and a number for one list; two may show the same one, above and below it.
  function pager(ids, key, title, show) {
    const parts = ids.map((id) => {
      const box = at(id), number = make("input"), of = make("span");
      const step = (text, label, move) => {
        const button = make("button", "", text);
        button.type = "button";
        button.setAttribute("aria-label", label);
        button.addEventListener("click", () => go(move()));
        return button;
      };
      const back = step("‹ Previous", `Previous page of ${title}`, () => state[key] - 1);
      const next = step("Next ›", `Next page of ${title}`, () => state[key] + 1);
      number.type = "number";
      number.min = 1;
      number.setAttribute("aria-label", `Page of ${title}`);
      number.addEventListener("change", () => go(Math.round(number.value || 1) - 1));
      box.append(back, number, of, next);
      return { box, number, of, back, next };
    });
    let pages = 1;
    function go(page) {
      state[key] = Math.min(Math.max(page, 0), pages - 1);
      show();
    }
    return (total) => {
      pages = Math.max(1, total);
      state[key] = Math.min(state[key], pages - 1);
      for (const { box, number, of, back, next } of parts) {
        box.hidden = pages === 1;
        number.value = state[key] + 1;
        number.max = pages;
        of.textContent = `of ${pages.toLocaleString("en")}`;
        back.disabled = state[key] === 0;
        next.disabled = state[key] === pages - 1;
      }
    };
  }

  let shownScans = [], shownFailures = [];
  const turnScans = pager(["pager", "pager-below"], "page", "scans", showScans);
  const turnFailures = pager(["failure-pager"], "failurePage", "failures", showFailures);

  function showScans() {
    turnScans(Math.ceil(shownScans.length / CARDS));
    const first = state.page * CARDS;
    const part = shownScans.slice(first, first + CARDS);
    const range = part.length ? ` (${(first + 1).toLocaleString("en")} to ${(first + part.length).toLocaleString("en")} shown)` : "";
    const chosen = shownScans.length < rows ? ` of ${rows.toLocaleString("en")}` : "";
    at("state").textContent = rows === 0 ? "The store has no scans."
      : `${count(shownScans.length, "scan", "scans")}${chosen}${range}` + (shownScans.length ? "" : ": nothing matches. Clear the search, the status or the reason.");
    at("gallery").replaceChildren(...part.map(card));
  }

  function showFailures() {
    turnFailures(Math.ceil(shownFailures.length / FAILURES));
    const first = state.failurePage * FAILURES;
    at("failure-state").textContent = failed.length === 0 ? "Every scan has a volume."
      : `${count(shownFailures.length, "scan", "scans")} of ${failed.length.toLocaleString("en")} without a volume`;
    at("failure-rows").replaceChildren(...shownFailures.slice(first, first + FAILURES).map(failureRow));
  }

  // New choices: filter both lists and start at their first pages.
  function choose() {
    state.page = state.failurePage = 0;
    shownScans = ordered(state.sort, state.down).filter(matches);
    shownFailures = failed.filter(matches);
    at("direction").textContent = state.down ? "↓ descending" : "↑ ascending";
    at("outliers").setAttribute("aria-pressed", state.outliers);
    for (const button of at("groups").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", Number(button.dataset.group) === state.group);
    }
    showScans();
    showFailures();
  }

  function option(value, text) {
    const element = make("option", "", text);
    element.value = value;
    return element;
  }

  const perStatus = data.statuses.map(() => 0), perGroup = data.groups.map(() => 0);
  for (const status of data.status) perStatus[status]++;
  for (const group of Object.values(data.group)) perGroup[group]++;

  at("status").append(option("", `all (${rows.toLocaleString("en")})`),
    ...data.statuses.map((status, i) => option(status, `${status} (${perStatus[i].toLocaleString("en")})`)));
  at("sort").append(...SORTS.map((sort) => option(sort.name, sort.title)));
  at("groups-part").hidden = data.groups.length === 0;
  at("groups").append(...data.groups.slice(0, GROUPS).map((group, i) => {
    const line = make("tr"), status = make("td"), choice = make("td"), button = make("button", "", "Show");
    status.append(make("span", `pill ${data.kinds[data.statuses.indexOf(group.status)]}`, group.status));
    button.type = "button";
    button.dataset.group = i;
    button.setAttribute("aria-label", `Show only: ${group.status}, ${group.pattern}`);
    button.addEventListener("click", () => { state.group = state.group === i ? null : i; choose(); });
    choice.append(button);
    line.append(status, make("td", "number", perGroup[i].toLocaleString("en")), make("td", "text", group.pattern || "no reason is kept"), choice);
    return line;
  }));
  if (data.groups.length > GROUPS) {
    at("more-groups").textContent = `… and ${count(data.groups.length - GROUPS, "other reason", "other reasons")}; the list below has every scan.`;
  }

  let waiting;
  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      state.terms = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
      choose();
    }, 60);
  });
  at("status").addEventListener("change", () => { state.status = at("status").value; choose(); });
  at("sort").addEventListener("change", () => {
    state.sort = SORTS.find((sort) => sort.name === at("sort").value);
    state.down = state.sort.down;
    choose();
  });
  at("direction").addEventListener("click", () => { state.down = !state.down; choose(); });
  at("outliers").addEventListener("click", () => { state.outliers = !state.outliers; choose(); });
  at("large").addEventListener("click", () => {
    at("large").setAttribute("aria-pressed", at("gallery").classList.toggle("large"));
  });
  at("clear").addEventListener("click", () => {
    clearTimeout(waiting);
    at("search").value = at("status").value = "";
    Object.assign(state, { terms: [], status: "", outliers: false, group: null });
    choose();
  });
  choose();
})();
