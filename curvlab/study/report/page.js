"use strict";
{
  const form = document.getElementById("search");
  const claims = [...document.querySelectorAll(".claim")];
  const said = new Map(claims.map((claim) => [claim, claim.textContent.toLowerCase()]));

  if (form) {
    const words = form.querySelector("input");
    const kind = form.querySelector("select");
    const count = form.querySelector("output");
    const sift = () => {
      const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const claim of claims) {
        const kept =
          wanted.every((word) => said.get(claim).includes(word)) &&
          (!kind.value || claim.dataset.kind === kind.value);
        claim.hidden = !kept;
        shown += kept;
      }
      for (const group of document.querySelectorAll(".group")) {
        group.hidden = !group.querySelector(".claim:not([hidden])");
      }
      count.textContent = `${shown} of ${claims.length} claims`;
    };
    const clear = () => {
      words.value = kind.value = "";
      sift();
    };
    form.hidden = false;
    form.addEventListener("input", sift);
    form.addEventListener("submit", (event) => event.preventDefault());
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) {
        event.preventDefault();
        words.focus();
      } else if (event.key === "Escape" && form.contains(document.activeElement)) {
        clear();
      }
    });
    const reveal = () => {
      const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
      if (target && target.closest("[hidden]")) {
        clear();
        target.scrollIntoView();
      }
    };
    addEventListener("hashchange", reveal);
    sift();
  }
}
