// What is known of each run, as the server sends it; and whether it still sends.

export const COLUMNS = ["step", "tokens", "seconds", "loss", "grad_norm", "tokens_per_second", "lr"];
export const COLUMN = Object.fromEntries(COLUMNS.map((name, i) => [name, i]));

const runs = []; // by number: {number, pace, facts, curves: {loss: columns, …}}
export const known = () => runs.filter((run) => run && run.facts);
export const runOf = (select) => runs[select.value] || known()[0];

// `changed(run, facts)` is told of each message, `said(words, live)` of the connection
export function follow(changed, said) {
  const source = new EventSource("events");
  source.addEventListener("hello", () => said("live", true));
  source.addEventListener("run", (event) => {
    const message = JSON.parse(event.data), run = (runs[message.run] ||= { number: message.run, curves: {} });
    take(run, message);
    changed(run, Boolean(message.facts));
  });
  source.addEventListener("ended", () => {
    source.close();
    said("this page's server has ended; losscurve watch starts another", false);
  });
  source.onerror = () => {
    said("connection lost, trying again", false);
    if (source.readyState === EventSource.CLOSED) setTimeout(() => follow(changed, said), 2000);
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
