// Votes are kept in this browser after each key, so the page can be closed and opened again; nothing is sent anywhere.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const key = `votes ${data.study} ${data.annotator}`;
  const $ = (id) => document.getElementById(id);
  let kept = true;
  const load = () => {
    try {
      return JSON.parse(localStorage.getItem(key)) || {};
    } catch {
      kept = false;
      return {};
    }
  };
  const votes = load();
  const voted = () => data.items.filter((item) => item.id in votes).length;
  const firstOpen = () => data.items.findIndex((item) => !(item.id in votes));
  let at = firstOpen() < 0 ? data.items.length : firstOpen();

  const save = () => {
    try {
      localStorage.setItem(key, JSON.stringify(votes));
    } catch {
      kept = false;
    }
  };

  const show = () => {
    const item = data.items[at];
    $("question").textContent = data.question;
    $("place").textContent = `${Math.min(at + 1, data.items.length)} of ${data.items.length}, ${voted()} voted on`;
    $("done").style.width = `${(100 * voted()) / data.items.length}%`;
    $("item").hidden = !item;
    $("end").hidden = Boolean(item);
    $("back").disabled = at === 0;
    $("next").disabled = !item || !(item.id in votes);
    $("note").textContent = kept ? "" : "This browser keeps nothing: do not close the page before you export.";
    if (!item) return;
    $("prompt").textContent = item.prompt;
    $("tie").hidden = !data.tie;
    $("tie").setAttribute("aria-pressed", votes[item.id] === "tie");
    $("answers").replaceChildren(
      ...item.answers.map((text, slot) => {
        const button = document.createElement("button");
        const label = document.createElement("kbd");
        const body = document.createElement("div");
        button.type = "button";
        button.className = "answer";
        button.setAttribute("aria-pressed", votes[item.id] === slot);
        label.textContent = String(slot + 1);
        body.textContent = text || "(empty)";
        body.dir = "auto";
        button.append(label, body);
        button.addEventListener("click", () => vote(slot));
        return button;
      }),
    );
  };

  const vote = (choice) => {
    const item = data.items[at];
    if (!item) return;
    votes[item.id] = choice;
    save();
    go(1);
  };

  const go = (step) => {
    const item = data.items[at];
    if (step > 0 && item && !(item.id in votes)) return;
    at = Math.min(Math.max(at + step, 0), data.items.length);
    if (at === data.items.length && firstOpen() >= 0) at = firstOpen();
    show();
    scrollTo(0, 0);
  };

  const exportVotes = () => {
    const left = data.items.length - voted();
    const content = { study: data.study, annotator: data.annotator, items: data.items.length, votes };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
    link.download = `votes-${data.annotator}.json`;
    link.click();
    $("note").textContent = left ? `Exported, but ${left} items are not voted on yet.` : "Exported. Thank you.";
  };

  $("tie").addEventListener("click", () => vote("tie"));
  $("back").addEventListener("click", () => go(-1));
  $("next").addEventListener("click", () => go(1));
  $("export").addEventListener("click", exportVotes);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const item = data.items[at];
    const number = Number(event.key);
    if (event.key === "ArrowLeft") go(-1);
    else if (event.key === "ArrowRight") go(1);
    else if (event.key.toLowerCase() === "e") exportVotes();
    else if (event.key === "0" && data.tie) vote("tie");
    else if (item && number >= 1 && number <= item.answers.length) vote(number - 1);
    else return;
    event.preventDefault();
  });
  show();
})();
