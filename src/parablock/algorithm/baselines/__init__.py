"""What other methods do differently; everything else they share: clients, wire, link, data order, evaluation.

| method | trained and sent | what else differs |
|---|---|---|
| fedavg | all parameters | nothing |
| fedprox | all parameters | a proximal term in the local loss |
| fedit | LoRA A and B | nothing: FedAvg of the adapters |
| ffa_lora | LoRA B | A stays as it was drawn |
| flora | LoRA A and B | drawn anew in each round; the server stacks them, and everybody adds their products |
| fedcybgd | one block | one client in each round, in turn, with a block of its own |
| local, central | all parameters | nothing is sent; `central` has all data in one client |
"""
