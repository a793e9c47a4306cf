
"use strict";
// Values under the pointer, the finger or the arrow keys; without this file the page says the same in its tables.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");
  document.body.append(tip);

  const say = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), edge = 8;
    const left = x + 14 + box.width > innerWidth - edge ? x - 14 - box.width : x + 14;
    const top = y - box.height - 12 < edge ? y + 18 : y - box.height - 12;
    tip.style.transform = `translate(${Math.max(edge, left)}px, ${top}px)`;
  };
  const grouped = (number) => (Math.abs(number) >= 1e4 ? number.toLocaleString("en-US") : String(number));

  const plots = [...document.querySelectorAll("svg.plot")].map((svg) => {
    const lines = [...svg.querySelectorAll("path[data-points]")].map((path) => {
      const flat = path.dataset.points.split(" ").map(Number);
      const steps = flat.filter((_, index) => index % 2 === 0), values = flat.filter((_, index) => index % 2);
      return { name: path.dataset.name, steps, values };
    });
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
    cursor.setAttribute("class", "cursor");
    svg.append(cursor);
    return { svg, lines, cursor, unit: svg.dataset.unit, from: Number(svg.dataset.from), to: Number(svg.dataset.to), height: svg.viewBox.baseVal.height };
  });

  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] <= steps[high] - step ? low : high;
  };

  const point = (plot, wanted, x, y) => {
    const densest = plot.lines.reduce((a, b) => (b.steps.length > a.steps.length ? b : a));
    const step = densest.steps[nearest(densest.steps, wanted)];
    const told = plot.lines.map((line) => {
      const index = nearest(line.steps, step), at = line.steps[index];
      return `${line.name}  ${grouped(line.values[index])}${at === step ? "" : `  (${plot.unit} ${grouped(at)})`}`;
    });
    for (const each of plots.filter((each) => each.unit === plot.unit)) {  // the same place in every figure of steps, of ranks
      const place = (1000 * (step - each.from)) / (each.to - each.from);
      each.cursor.setAttribute("d", place >= 0 && place <= 1000 ? `M${place} 0V${each.height}` : "");
    }
    plot.step = step;
    say([`${plot.unit} ${grouped(step)}`, ...told].join("\n"), x, y);
  };
  const leave = () => {
    tip.hidden = true;
    for (const each of plots) each.cursor.setAttribute("d", "");
  };

  for (const plot of plots) {
    const { svg } = plot, follow = (event) => {
      const box = svg.getBoundingClientRect();
      point(plot, plot.from + ((event.clientX - box.left) / box.width) * (plot.to - plot.from), event.clientX, event.clientY);
    };
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") leave();
      if (!way) return;
      event.preventDefault();
      const box = svg.getBoundingClientRect(), stride = (plot.to - plot.from) / 60;
      const step = Math.min(plot.to, Math.max(plot.from, (plot.step ?? plot.from) + way * Math.max(1, stride)));
      point(plot, step, box.left + ((step - plot.from) / (plot.to - plot.from)) * box.width, box.top + 40);
    });
  }
  for (const shape of document.querySelectorAll("rect[data-tip]")) {
    const tell = (event) => say(shape.dataset.tip, event.clientX, event.clientY);
    shape.addEventListener("pointermove", tell);
    shape.addEventListener("pointerdown", tell);
    shape.addEventListener("pointerleave", leave);
  }
})();
