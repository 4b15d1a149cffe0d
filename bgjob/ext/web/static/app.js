// What the page does besides links and forms: it renews its live parts, shows how long ago
// something was, and takes "/" to the search. Without this file everything else works.
"use strict";
(() => {
  const policy = window.trustedTypes?.createPolicy("bgjob", { createHTML: (html) => html });
  const tags = new Map(); // the ETag of each part, by its id
  let skew = 0; // the server's clock less this one, in ms
  let renewed = Date.now();
  let held = false;

  // -- times ---------------------------------------------------------------------------------

  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];

  const lasting = (seconds) => {
    const whole = Math.floor(seconds);
    const first = units.findIndex(([, size]) => whole >= size);
    if (first < 0) return "0 s";
    const [name, size] = units[first];
    const text = `${Math.floor(whole / size)} ${name}`;
    if (size === 1 || (size === 60 && whole >= 600)) return text;
    const [below, part] = units[first + 1];
    const rest = Math.floor((whole % size) / part);
    return rest ? `${text} ${rest} ${below}` : text;
  };

  const tick = () => {
    if (document.hidden) return;
    for (const time of document.querySelectorAll("time[data-as]")) {
      const seconds = (Date.now() + skew - Date.parse(time.dateTime)) / 1000;
      const long = lasting(Math.abs(seconds));
      const ago = seconds < 0 ? `in ${long}` : `${long} ago`;
      const text = time.dataset.as === "span" ? long : ago;
      if (time.textContent !== text && !marked(time)) time.textContent = text;
    }
    const seconds = Math.round((Date.now() - renewed) / 1000);
    said.textContent = held ? "not renewed" : `renewed ${lasting(seconds)} ago`;
  };

  // -- renewal -------------------------------------------------------------------------------

  const said = document.getElementById("renewed");
  const trouble = document.getElementById("trouble");
  const hold = document.getElementById("hold");

  const marked = (part) => {
    const marks = getSelection();
    return marks && !marks.isCollapsed && marks.containsNode(part, true);
  };

  // A part in use stays as it is: a button must not move away under the pointer.
  const used = (part) =>
    held || document.hidden || marked(part) || part.contains(document.activeElement) ||
    part.querySelector("button:hover, .button:hover, summary:hover, details[open]");

  const renew = async (id) => {
    const part = document.getElementById(id);
    if (!part || used(part)) return;
    const headers = tags.has(id) ? { "If-None-Match": tags.get(id) } : {};
    const url = new URL(location.href);
    url.searchParams.set("part", id);
    const answer = await fetch(url, { headers, cache: "no-store", redirect: "error" });
    const date = Date.parse(answer.headers.get("Date"));
    if (date) skew = date - Date.now();
    if (answer.status !== 304 && !answer.ok) throw new Error(`the server answered ${answer.status}`);
    if (answer.ok) {
      const text = await answer.text();
      const page = new DOMParser().parseFromString(policy ? policy.createHTML(text) : text, "text/html");
      const fresh = page.getElementById(id);
      if (!fresh || used(part)) return;
      part.replaceWith(fresh);
      tags.set(id, answer.headers.get("ETag"));
    }
    renewed = Date.now();
    trouble.textContent = "";
  };

  const attempt = async (id) => {
    try {
      await renew(id);
    } catch (error) {
      const since = lasting((Date.now() - renewed) / 1000);
      trouble.textContent = `This page was not renewed for ${since}: ${error.message}.`;
    }
    tick();
  };

  const keep = async (id, every) => {
    await attempt(id);
    const next = document.getElementById(id)?.dataset.every || every;
    setTimeout(keep, 1000 * next, id, next);
  };

  const parts = document.querySelectorAll("[data-live]");
  for (const { id, dataset } of parts) setTimeout(keep, 1000 * dataset.every, id, dataset.every);
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) for (const { id } of parts) attempt(id);
  });
  if (parts.length) {
    hold.parentElement.hidden = false;
    hold.addEventListener("click", () => {
      held = !held;
      hold.setAttribute("aria-pressed", held);
      tick();
    });
  }

  document.addEventListener("keydown", (event) => {
    const busy = event.target.closest("input, textarea, select, [contenteditable]");
    const search = document.getElementById("search");
    if (event.key !== "/" || busy || !search || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    search.focus();
  });

  tick();
  setInterval(tick, 1000);
})();
