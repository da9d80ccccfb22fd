// The page that explains: the walk's frames are fetched when somebody first touches the slider, and the critic is asked
// for its opinion once the rest is there.
const slider = document.getElementById("walk-position");
const addresses = slider.dataset.frames.split(" ");
const frames = [];

function fetchAll() {
  if (frames.length) return;
  for (const address of addresses) {
    const frame = new Image();
    frame.src = address;
    frames.push(frame);
  }
}

slider.hidden = false;
document.getElementById("walk-hint").hidden = false;
slider.addEventListener("pointerenter", fetchAll, { once: true });
slider.addEventListener("focus", fetchAll, { once: true });
slider.addEventListener("input", () => {
  fetchAll();
  const image = document.getElementById("walk-image");
  image.src = addresses[Number(slider.value)];
  slider.setAttribute("aria-valuetext", `${Math.round((100 * slider.value) / (addresses.length - 1))} % of the way`);
});

function fill(row, addresses, description) {
  for (const address of addresses) {
    const figure = document.createElement("figure");
    const image = new Image();
    image.src = address;
    image.alt = description;
    figure.append(image);
    row.append(figure);
  }
}

const section = document.getElementById("ranking");
if (section) {
  const answer = await fetch(section.dataset.source);
  if (answer.ok) {
    const { count, best, worst } = await answer.json();
    const { noun } = section.dataset;
    document.getElementById("ranking-count").textContent = count;
    fill(document.getElementById("ranking-best"), best, `A ${noun} that looks usual to the critic`);
    fill(document.getElementById("ranking-worst"), worst, `A ${noun} that looks strange to the critic`);
    section.hidden = false;
  }
}
