// The page of one face: the next one without a reload, a walk to it, and the links that belong to what is shown.
const main = document.querySelector("main");
const { model, noun } = main.dataset;
const ownTruncation = Number(main.dataset.ownTruncation);
const element = (id) => document.getElementById(id);
const canvas = element("walk-canvas");
const slider = element("truncation");

const WALK_FRAMES = 25;
const WALK_SECONDS = 2.4;

// What is shown; an address that names it is kept up to date, the page that shows anybody stays what it is.
let seed = main.dataset.seed;
let truncation = Number(main.dataset.truncation);
let walking = false;
let turn = 0; // of several wishes at once the last one counts
let upcoming = null;
const past = []; // those who went by

const path = (seed) => `/${encodeURIComponent(model)}/${encodeURIComponent(seed)}`;

function query(more = {}) {
  const given = new URLSearchParams(more);
  if (truncation !== ownTruncation) given.set("truncation", truncation);
  if (main.dataset.class) given.set("class", main.dataset.class);
  if (main.dataset.attr) given.set("attr", main.dataset.attr);
  const text = given.toString();
  return text && `?${text}`;
}

const imageAddress = (seed) => `${path(seed)}.png${query()}`;
const frameAddress = (seed, more) => `${path(seed)}.webp${query(more)}`;

function freshSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

async function load(address) {
  const image = new Image();
  image.src = address;
  await image.decode();
  return image;
}

// The next face is fetched and decoded before anybody asks for it.
function prepare() {
  const seed = freshSeed();
  upcoming = { seed, image: load(imageAddress(seed)) };
  upcoming.image.catch(() => {});
}

function tell(sentence, isProblem = false) {
  element("news").textContent = sentence;
  element("news").classList.toggle("visually-hidden", !isProblem);
}

// What takes a while shows that it does.
function busy(is) {
  main.toggleAttribute("data-busy", is);
}

function show(newSeed, image) {
  seed = newSeed;
  const face = element("face");
  image.className = face.className;
  image.id = face.id;
  image.width = face.width;
  image.height = face.height;
  image.alt = `A ${noun} that does not exist, number ${seed}`;
  face.replaceWith(image);
  element("glow").src = image.src;
  describe();
}

function describe() {
  element("permalink").href = path(seed) + query();
  element("download").href = `${path(seed)}.png${query()}`;
  element("download").download = `${model}-${seed}.png`;
  element("recipe").href = `/api${path(seed)}${query()}`;
  slider.value = truncation;
  slider.setAttribute("aria-valuetext", `${Math.round(truncation * 100)} %`);
}

// The page of anybody keeps its address; what it shows is found again when somebody comes back to it.
function remember(replaces = false) {
  const isPermanent = main.dataset.permanent !== undefined;
  const address = (isPermanent ? path(seed) : location.pathname) + query();
  history[replaces || !isPermanent ? "replaceState" : "pushState"]({ seed, truncation }, "", address);
}

async function attempt(work) {
  const mine = ++turn;
  busy(true);
  try {
    const finish = await work();
    if (mine === turn) finish();
  } catch {
    if (mine === turn) tell("That picture could not be fetched. Try again in a moment.", true);
  } finally {
    if (mine === turn) busy(false);
  }
}

function next() {
  const wanted = upcoming;
  attempt(async () => {
    const image = await wanted.image.catch(() => load(imageAddress(wanted.seed)));
    return () => {
      past.push({ seed, truncation });
      show(wanted.seed, image);
      remember();
      tell(`Another ${noun}, number ${seed}. It does not exist, either.`);
      prepare();
    };
  });
}

function goTo(newSeed, replaces = true) {
  attempt(async () => {
    const image = await load(imageAddress(newSeed));
    return () => {
      show(newSeed, image);
      remember(replaces);
      tell("");
    };
  });
}

function previous() {
  const was = past.pop();
  if (!was) return;
  truncation = was.truncation;
  goTo(was.seed, false);
}

// Frames between here and the next face, each blended into the one after it; drawn no faster than they arrive.
async function walk() {
  if (walking) return;
  walking = true;
  const mine = ++turn; // whatever is asked for meanwhile ends the walk
  element("walk").setAttribute("aria-disabled", "true");
  busy(true);
  const to = upcoming.seed;
  const between = Array.from({ length: WALK_FRAMES - 2 }, (_, k) => frameAddress(seed, { to, frames: WALK_FRAMES, frame: k + 1 }));
  const frames = [element("face")];
  let failed = null;
  const arriving = [...between.map(load), upcoming.image.catch(() => load(imageAddress(to)))];
  (async () => {
    for (const frame of arriving) frames.push(await frame);
  })().catch((error) => (failed = error));
  arriving.forEach((frame) => frame.catch(() => {}));
  try {
    if (!(await play(frames, () => failed, () => mine === turn))) return;
    past.push({ seed, truncation });
    show(to, frames.at(-1));
    remember();
    tell(`Arrived at another ${noun}, number ${seed}. It does not exist, either.`);
    prepare();
  } catch {
    if (mine === turn) tell("The walk broke off: a picture could not be fetched. Try again in a moment.", true);
  } finally {
    canvas.hidden = true;
    walking = false;
    if (mine === turn) busy(false);
    element("walk").removeAttribute("aria-disabled");
  }
}

function play(frames, failure, isWanted) {
  const context = canvas.getContext("2d");
  context.drawImage(frames[0], 0, 0, canvas.width, canvas.height);
  canvas.hidden = false;
  let position = 0;
  let before = null;
  return new Promise((resolve, reject) => {
    requestAnimationFrame(function step(now) {
      if (!isWanted()) return resolve(false);
      if (failure()) return reject(failure());
      const speed = (WALK_FRAMES - 1) / WALK_SECONDS / 1000;
      position = Math.min(position + speed * (before === null ? 0 : now - before), frames.length - 1);
      before = now;
      const whole = Math.floor(position);
      context.globalAlpha = 1;
      context.drawImage(frames[whole], 0, 0, canvas.width, canvas.height);
      if (whole + 1 < frames.length) {
        context.globalAlpha = position - whole;
        context.drawImage(frames[whole + 1], 0, 0, canvas.width, canvas.height);
      }
      if (position >= WALK_FRAMES - 1) return resolve(true);
      requestAnimationFrame(step);
    });
  });
}

async function showRecipe() {
  try {
    const answer = await fetch(`/api${path(seed)}${query()}`);
    if (!answer.ok) throw new Error(answer.statusText);
    const { command, recipe } = await answer.json();
    element("recipe-command").textContent = command;
    element("recipe-json").textContent = JSON.stringify(recipe, null, 2);
    element("recipe-dialog").showModal();
  } catch {
    tell("The recipe could not be fetched. Try again in a moment.", true);
  }
}

element("next-form").addEventListener("submit", (event) => {
  event.preventDefault();
  next();
});
element("walk").addEventListener("click", walk);
element("recipe").addEventListener("click", (event) => {
  event.preventDefault();
  showRecipe();
});
let pause;
slider.addEventListener("input", () => {
  truncation = Number(slider.value);
  describe();
  clearTimeout(pause);
  pause = setTimeout(() => {
    goTo(seed);
    prepare();
  }, 60);
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || element("recipe-dialog").open) return;
  if (event.target.closest("input") && event.key.startsWith("Arrow")) return; // they move the slider
  if (event.key === " " && event.target.closest("button")) return; // pressing it comes first
  const action = { " ": next, ArrowRight: next, ArrowLeft: previous, w: walk, W: walk }[event.key];
  if (!action) return;
  event.preventDefault();
  if (!event.repeat) action();
});
addEventListener("popstate", (event) => {
  if (!event.state) return;
  truncation = event.state.truncation;
  goTo(event.state.seed);
  prepare();
});

const cameBack = performance.getEntriesByType("navigation")[0]?.type === "back_forward";
if (cameBack && history.state && history.state.seed !== seed) {
  truncation = history.state.truncation;
  goTo(history.state.seed);
} else {
  remember(true);
}
element("walk").hidden = false;
element("variety").hidden = false;
describe();
prepare();

// The first picture came with the page: it is tried once more, by the way that says so where it fails.
element("face")
  .decode()
  .catch(() => turn || goTo(seed));
