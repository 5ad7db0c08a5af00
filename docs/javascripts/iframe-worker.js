// The theme searches in a worker, which browsers deny to pages that were opened from disk. There, a
// hidden frame takes its place: it runs the worker's script, and messages go by way of events.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #inside;

    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.answer = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      frame.srcdoc = `
        <script>postMessage = (data) => frameElement.answer(data)</script>
        <script src="${url}"></script>`;
      this.#inside = new Promise((resolve) => {
        frame.onload = () => resolve(frame.contentWindow);
      });
      document.body.append(frame);
    }

    postMessage(data) {
      this.#inside.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
