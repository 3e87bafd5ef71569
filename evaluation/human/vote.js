// Votes are kept in this browser after each key, so the page can be closed and opened again; nothing is sent anywhere.
// In IndexedDB: of what pages opened from a file put in localStorage, Chromium loses some at a reload.
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const key = `votes ${data.study} ${data.annotator}`;
  const $ = (id) => document.getElementById(id);
  let kept = true;
  const open = () =>
    new Promise((resolve, reject) => {
      const request = indexedDB.open("votes", 1);
      request.onupgradeneeded = () => request.result.createObjectStore("votes");
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  // What ``act`` asked of the store of votes, once it is on record; nothing where the browser keeps nothing.
  const database = open().catch(() => null);
  const transact = async (mode, act) => {
    try {
      const transaction = (await database).transaction("votes", mode);
      const request = act(transaction.objectStore("votes"));
      await new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onabort = () => reject(transaction.error);
      });
      return request.result;
    } catch {
      kept = false;
    }
  };
  const votes = (await transact("readonly", (store) => store.get(key))) || {};
  const voted = () => data.items.filter((item) => item.id in votes).length;
  const firstOpen = () => data.items.findIndex((item) => !(item.id in votes));
  let at = firstOpen() < 0 ? data.items.length : firstOpen();

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
        button.addEventListener("click", () => queue(() => vote(slot)));
        return button;
      }),
    );
  };

  const vote = async (choice) => {
    const item = data.items[at];
    if (!item) return;
    votes[item.id] = choice;
    await transact("readwrite", (store) => store.put(votes, key));
    go(1);
  };
  // One action after another: a second key never meets an item whose vote is still being kept.
  let last = null;
  const queue = (act) => (last = Promise.resolve(last).then(act));

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

  const act = (name) => {
    const item = data.items[at];
    const number = Number(name);
    if (name === "ArrowLeft") return go(-1);
    if (name === "ArrowRight") return go(1);
    if (name === "e") return exportVotes();
    if (name === "0" && data.tie) return vote("tie");
    if (item && number >= 1 && number <= item.answers.length) return vote(number - 1);
  };
  const keys = { tie: "0", back: "ArrowLeft", next: "ArrowRight", export: "e" };
  for (const [id, name] of Object.entries(keys)) $(id).addEventListener("click", () => queue(() => act(name)));
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (!/^(\d|ArrowLeft|ArrowRight|e)$/i.test(event.key)) return;
    event.preventDefault();
    queue(() => act(event.key.length === 1 ? event.key.toLowerCase() : event.key));
  });
  show();
})();
