package meta

// Version changes when the same layers give another metadata image than before, so that one that was kept is
// not taken for one that would be made now.
const Version = "lazuli-meta-1"
