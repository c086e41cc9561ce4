
(() => {
  "use strict";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const form = document.getElementById("filters");
  const controls = { modality: form.elements.modality, tool: form.elements.tool, policy: form.elements.policy };
  const said = form.querySelector("output");
  let at = "";

  // Sorting. What is not a number, and what is missing, goes last whichever way.
  const tables = new Map(all("table[data-sortable]").map(table => [table.id, table]));
  const original = new Map([...tables.values()].map(table => [table, [...table.tBodies[0].rows]]));
  const sorts = new Map();
  const heads = table => all("thead th[data-sort]", table);

  const sort = (table, key, way) => {
    const rows = [...original.get(table)];
    const column = heads(table).find(head => head.dataset.sort === key);
    for (const head of heads(table)) head.removeAttribute("aria-sort");
    if (!column) { sorts.delete(table.id); table.tBodies[0].append(...rows); return; }
    column.setAttribute("aria-sort", way);
    sorts.set(table.id, key + "." + way);
    const value = row => row.querySelector('[data-k="' + key + '"]')?.dataset.v ?? "";
    const sign = way === "descending" ? -1 : 1;
    rows.sort((a, b) => {
      const x = value(a), y = value(b);
      if (!x || !y) return (x === "") - (y === "");
      return sign * (column.dataset.words === undefined ? x - y : x.localeCompare(y));
    });
    table.tBodies[0].append(...rows);
  };

  for (const table of tables.values()) for (const head of heads(table)) {
    const button = head.querySelector("button");
    button.disabled = false;
    button.addEventListener("click", () => {
      const first = head.dataset.first ?? "descending", other = first === "descending" ? "ascending" : "descending";
      const now = head.getAttribute("aria-sort");
      if (now === other) sort(table, "", "");
      else sort(table, head.dataset.sort, now === first ? other : first);
      say(table.dataset.name + (now === other ? ": in the order of rank" : ": by " + button.textContent.trim() + ", " + head.getAttribute("aria-sort")));
      store();
    });
  }

  // Filtering. A thing is shown if all it belongs to is asked for; what has no tool, say, belongs to every tool.
  const sees = new Map(all("table.board tbody tr").map(row => [row.dataset.policy, row.dataset.sees]));
  const asked = name => controls[name].value;
  const fits = (element, name) => {
    const wanted = asked(name), own = element.dataset[name];
    if (!wanted || own === undefined) return true;
    if (name === "policy" && wanted.startsWith("sees:")) return sees.get(own) === wanted.slice(5);
    return own.split("|").includes(wanted);
  };
  const shown = element => fits(element, "modality") && fits(element, "tool") && fits(element, "policy");

  const filter = () => {
    for (const element of all("[data-filter]")) element.hidden = !shown(element);
    for (const line of all(".series")) line.classList.toggle("dim", !fits(line, "policy"));
    for (const holder of all("[data-holder]")) {
      const members = all("[data-filter]", holder);
      const none = members.length > 0 && !members.some(member => !member.hidden && !member.parentElement.closest("[data-filter][hidden]"));
      const note = holder.querySelector(":scope > .empty");
      if (note) note.hidden = !none;
    }
    const rows = all("table.board tbody tr");
    const visible = rows.filter(row => !row.hidden && !row.closest("section[hidden]")).length;
    say(visible === rows.length ? rows.length + " agents' rows" : visible + " of " + rows.length + " agents' rows shown");
  };
  const say = words => { said.textContent = words; };

  // The address holds the state: #tool=Nano&sort=t-quick.iou.ascending&at=quick
  const store = () => {
    const state = new URLSearchParams();
    for (const name of Object.keys(controls)) if (asked(name)) state.set(name, asked(name));
    if (sorts.size) state.set("sort", [...sorts].map(([table, by]) => table + "." + by).join(" "));
    if (at) state.set("at", at);
    const words = state.toString();
    history.replaceState(null, "", words ? "#" + words : location.pathname + location.search);
  };
  const restore = () => {
    const words = location.hash.slice(1);
    if (!words) return;
    if (!words.includes("=")) { at = words; return; }
    const state = new URLSearchParams(words);
    for (const [name, control] of Object.entries(controls)) {
      const wanted = state.get(name) ?? "";
      control.value = [...control.options].some(option => option.value === wanted) ? wanted : "";
    }
    for (const table of tables.values()) if (sorts.has(table.id)) sort(table, "", "");
    for (const item of (state.get("sort") ?? "").split(" ")) {
      const [id, key, way] = item.split(".");
      if (tables.has(id) && (way === "ascending" || way === "descending")) sort(tables.get(id), key, way);
    }
    at = state.get("at") ?? "";
    filter();
    if (at) document.getElementById(at)?.scrollIntoView();
  };

  form.hidden = false;
  form.parentElement.hidden = false;
  document.documentElement.classList.add("js");
  for (const control of Object.values(controls)) control.addEventListener("change", () => { filter(); store(); });
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => {
    for (const table of tables.values()) sort(table, "", "");
    filter();
    store();
  }));
  for (const link of all('nav a[href^="#"]')) link.addEventListener("click", event => {
    const target = document.getElementById(link.hash.slice(1));
    if (!target) return;
    event.preventDefault();
    at = target.id;
    store();
    target.scrollIntoView();
    target.focus({ preventScroll: true });
  });
  addEventListener("hashchange", restore);
  filter();
  restore();
})();
