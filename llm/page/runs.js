// The state of each run, from the messages of the server, and whether the server still sends.

export const COLUMNS = ["step", "tokens", "seconds", "loss", "grad_norm", "tokens_per_second", "lr"];
export const COLUMN = Object.fromEntries(COLUMNS.map((name, i) => [name, i]));

const runs = []; // by number: {number, pace, facts, curves: {loss: columns, …}}
export const knownRuns = () => runs.filter((run) => run && run.facts);
export const selectedRun = (select) => runs[select.value] || knownRuns()[0];

// calls `changed(run, facts)` after each message, and `setConnection(words, live)` when the connection changes
export function follow(changed, setConnection) {
  const source = new EventSource("events");
  source.addEventListener("hello", () => setConnection("live", true));
  source.addEventListener("run", (event) => {
    const message = JSON.parse(event.data), run = (runs[message.run] ||= { number: message.run, curves: {} });
    take(run, message);
    changed(run, Boolean(message.facts));
  });
  source.addEventListener("ended", () => {
    source.close();
    setConnection("this page's server has stopped; start it again with losscurve watch", false);
  });
  source.onerror = () => {
    setConnection("connection lost, reconnecting", false);
    if (source.readyState === EventSource.CLOSED) setTimeout(() => follow(changed, setConnection), 2000);
  };
}

function take(run, message) {
  run.pace = message.pace;
  run.facts = message.facts || run.facts;
  run.curves = message.all || run.curves;
  const rows = message.more;
  for (const [name, columns] of rows ? Object.entries(run.curves) : []) {
    const kept = rows[0].map((_, i) => i).filter((i) => rows[COLUMN[name]][i] !== null);
    columns.forEach((column, c) => column.push(...kept.map((i) => rows[c][i])));
  }
}
