// Owns what the page does in the browser alone: language and names of its parts, pictures dropped
// or pasted anywhere, the ticket of the conversation, saving, the drawer of settings.
const minimind = (() => {
  const codes = Object.keys(MINIMIND_WORDS.languages);
  let code = "en";

  // Gradio's buttons under a message, by the name that it gives them in its own language.
  const ICONS = {
    copy: /copy|复制|已/i,
    retry: /retry|重试|regenerate/i,
    undo: /undo|撤|edit/i,
    fullscreen: /fullscreen|全屏|full/i,
  };

  const set = (element, name, value) => {
    if (element.getAttribute(name) !== value) element.setAttribute(name, value);
  };

  const pictureName = (url) => {
    const name = decodeURIComponent(url.split("/").pop()).replace(/\.\w+$/, "");
    const [, chinese, english] = name.match(/^([^-]*[\u4e00-\u9fff][^-]*)-(.+)$/) || [];
    return (english ? (code === "zh" ? chinese : english) : name).replace(/[-_]+/g, " ");
  };

  const nameAll = () => {
    for (const button of document.querySelectorAll("#chat .icon-button:not([data-minimind])")) {
      const given = button.title || button.getAttribute("aria-label") || "";
      const kind = Object.keys(ICONS).find((k) => ICONS[k].test(given));
      if (kind) button.dataset.minimind = kind;
    }
    for (const [selector, names] of Object.entries(MINIMIND_WORDS.names)) {
      for (const element of document.querySelectorAll(selector)) {
        const isImage = element.tagName === "IMG";
        set(element, isImage ? "alt" : "aria-label", names[codes.indexOf(code)]);
        if (element.tagName === "BUTTON") set(element, "title", names[codes.indexOf(code)]);
      }
    }
    for (const image of document.querySelectorAll("#chat img, #box img, #examples img, .card img"))
      set(image, "alt", pictureName(image.src));
    for (const image of document.querySelectorAll("#examples img"))
      set(image.closest("button"), "aria-label", image.alt);
    for (const button of document.querySelectorAll(".image-container > button"))
      set(button, "aria-label", button.querySelector("img")?.alt || "");
    for (const part of document.querySelectorAll("#chat [data-testid]:not([role])"))
      set(part, "role", "group");
    for (const header of document.querySelectorAll(".toast-header")) set(header, "role", "none");
    for (const told of document.querySelectorAll(".toast-message-text")) translate(told);
    for (const told of document.querySelectorAll(".sr-only"))  // words that Gradio lacks
      for (const part of told.childNodes) if (part.data?.startsWith("common.")) part.data = "";
    set(document.documentElement, "lang", code === "zh" ? "zh-CN" : "en");
    const title = MINIMIND_WORDS.languages[code].title;
    if (document.title !== title) document.title = title;
  };

  // Messages of Gradio's own script; those of the server come translated.
  const translate = (element) => {
    if (code !== "zh") return;
    for (const [pattern, chinese] of Object.entries(MINIMIND_WORDS.errors)) {
      const whole = new RegExp(`^${pattern}$`, "s");
      if (whole.test(element.innerText)) {
        const filled = chinese.replace(/\\(\d)/g, "$$$1");
        element.innerText = element.innerText.replace(whole, filled);
        return;
      }
    }
  };

  let isDue = false;
  const nameSoon = () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      nameAll();
    });
  };

  const remember = (storage, key, value) => {
    try {
      storage.setItem(key, value);
    } catch {} // a browser that keeps nothing: the page works, but forgets
  };
  const recall = (storage, key) => {
    try {
      return storage.getItem(key) || "";
    } catch {
      return "";
    }
  };

  const box = () => document.querySelector("#box textarea");
  const holdsFiles = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  const takesItself = (event) => event.target.closest?.("#box, #camera");

  addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener(
    "drop",
    (event) => {
      document.body.classList.remove("dropping");
      if (!holdsFiles(event) || takesItself(event)) return;
      event.preventDefault();
      event.stopPropagation();
      const { dataTransfer } = event;
      box()?.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
    },
    true,
  );
  addEventListener("paste", (event) => {
    const { clipboardData, target } = event;
    if (!clipboardData?.files.length || target.closest?.("#box, input, textarea")) return;
    box()?.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") toggle(false);
  });

  const toggle = (isOpen) => {
    const now = document.body.classList.toggle("tools-open", isOpen);
    const button = document.querySelector("#tools_button");
    if (button) set(button, "aria-expanded", String(now));
  };

  // Gradio copies what it was given: a message whose signs are escaped for HTML.
  addEventListener(
    "click",
    (event) => {
      const button = event.target.closest?.("#chat [data-minimind=copy]");
      const row = button?.closest(".message-buttons")?.previousElementSibling;
      const words = row?.querySelector(".message-content")?.innerText;
      if (!words || !navigator.clipboard) return;
      event.stopPropagation();
      navigator.clipboard.writeText(words);
      button.classList.add("copied");
      setTimeout(() => button.classList.remove("copied"), 1500);
    },
    true,
  );
  addEventListener("click", (event) => {
    if (event.target.closest?.("#tools_button")) toggle();
  });

  new MutationObserver(nameSoon).observe(document.documentElement, {
    childList: true,
    subtree: true,
    characterData: true,
    attributeFilter: ["aria-label", "title", "src"],
  });
  nameSoon();

  return {
    /** The language was chosen, by its name. */
    speak(name) {
      code = codes.find((c) => MINIMIND_WORDS.languages[c].name === name) || "en";
      remember(localStorage, "minimind-language", code);
      nameSoon();
    },
    /** What this browser keeps, for the server: ticket and language. */
    kept: () =>
      [`${recall(sessionStorage, "minimind-ticket")} ${recall(localStorage, "minimind-language")}`],
    keep: (ticket) => remember(sessionStorage, "minimind-ticket", ticket),
    /** Make a file of a page's HTML. */
    save(page) {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([page], { type: "text/html" }));
      link.download = "conversation.html";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    },
  };
})();
