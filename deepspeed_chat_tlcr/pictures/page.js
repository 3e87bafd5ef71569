// Values at once, under a mouse or a finger, instead of the browser's slow tooltips (which stay without this script).
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const words = (element) => {
    if (element.dataset.tip === undefined) {
      const title = element.querySelector(":scope > title");
      element.dataset.tip = title ? title.textContent : element.getAttribute("title") || "";
      if (title) title.remove();
      element.removeAttribute("title");
    }
    return element.dataset.tip;
  };
  const show = (event) => {
    const element = event.target.closest("[title], [data-tip], .hover");
    tip.hidden = !element || !words(element);
    if (tip.hidden) return;
    tip.textContent = words(element);
    const { width, height } = tip.getBoundingClientRect();
    const below = event.clientY + 18;
    tip.style.left = Math.max(6, Math.min(event.clientX + 12, document.documentElement.clientWidth - width - 6)) + "px";
    tip.style.top = (below + height < innerHeight ? below : event.clientY - height - 12) + "px";
  };
  addEventListener("pointermove", show);
  addEventListener("pointerdown", show);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
